"""Trains lists of jobs in a new process, each list on as many ranks as its configs say.

Ranks other than 0 are forks, too: the command with which runs/devices.py starts them takes seconds
of imports. tests/test_devices.py runs that command once.
"""

import os
import runpy
import sys
import warnings
from multiprocessing import get_context
from subprocess import CompletedProcess
from types import SimpleNamespace

from forked import Forked

from sae_lightning import UserError
from sae_lightning.runs import devices, passes
from sae_lightning.runs.jobs import Job


def train_on_ranks(*lists: list[Job]) -> CompletedProcess:
    """Train lists of jobs in one process, one list after the other, so that ranks start only once
    for lists with the same number of ranks; fails if that process does."""
    done = start_on_ranks(*lists).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def start_on_ranks(*lists: list[Job]) -> Forked:
    """Begin what `train_on_ranks` does."""
    return Forked(_train, lists)


def _train(lists: tuple[list[Job], ...]) -> None:
    fork_ranks()
    for jobs in lists:
        try:
            passes.train_jobs(jobs)
        except UserError as error:
            sys.exit(f"error: {error}")


def fork_ranks() -> None:
    """Make this process start other ranks as its forks."""
    warnings.simplefilter("ignore")
    devices.subprocess = SimpleNamespace(Popen=ForkedRank, DEVNULL=None)


class ForkedRank(get_context("fork").Process):
    """Has what runs/devices.py uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], env: dict[str, str], stdin: None) -> None:
        super().__init__(target=_run_python, args=(command[1:], env), daemon=True)
        self.start()

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> None:
        self.join()


def _run_python(arguments: list[str], env: dict[str, str]) -> None:
    """Do what `python arguments` does."""
    os.environ.clear()
    os.environ.update(env)
    if arguments[0] == "-W":
        del arguments[:2]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
