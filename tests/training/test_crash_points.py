"""A run that is killed at any file operation and resumed ends as if it had not been killed."""

import builtins
import io
import os
import random
from dataclasses import replace

import pytest
from test_run import assert_same

from sae_lightning.runs import folders, passes

OPERATIONS = [
    (os, name) for name in ("open", "fsync", "chmod", "replace", "unlink", "mkdir", "rmdir")
]
OPERATIONS += [(io, "open"), (builtins, "open")]  # to write; the first is pathlib's
DIED, FAILED = 9, 1


def fork(work, *args) -> int:
    """Call `work` in a child process, which exits without clean-up; returns its exit code."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(job, count, die_at=None):
    """Train or resume; the number of operations on files goes to the file `count`."""
    done, io_open = 0, io.open

    def counted(operation):
        def call(*args, **kwargs):
            nonlocal done
            if operation is not io_open or set("wax+") & set(kwargs.get("mode", (*args, "r")[1])):
                if done == die_at:
                    os._exit(DIED)
                done += 1
            return operation(*args, **kwargs)

        return call

    for module, name in OPERATIONS:
        setattr(module, name, counted(getattr(module, name)))
    passes.train_jobs([replace(job, resumed=(job.folder / "config.yaml").exists())])
    count.write_text(str(done))


def check_crash_points(job, tmp_path, number, rng):
    """Let runs die at `number` random operations, each resumed to its end."""
    count, whole = tmp_path / "count", job("whole")
    for run in (whole, job("counted")):  # the first one also leaves the tokenised text in a cache
        assert fork(train, run, count) == 0
    for point in sorted(rng.sample(range(int(count.read_text())), number)):
        died = job(f"died{point}")
        assert fork(train, died, count, point) == DIED
        assert fork(train, died, count) == 0, point
        assert_same(whole.folder, died.folder)
        assert folders.read_failure(died.folder) is None
        assert names(died.folder) == names(whole.folder), point


def names(folder):
    """Files of a run folder, except TensorBoard's (their names hold the time) and the lock file
    that a killed process leaves."""
    files = (str(file.relative_to(folder)) for file in folder.rglob("*"))
    return {name for name in files if not name.startswith("events.")} - {".lock"}


@pytest.mark.slow
def test_a_run_that_dies_at_any_operation_on_files_ends_as_if_it_had_not(job, tmp_path):
    check_crash_points(job, tmp_path, 5, random.Random())
