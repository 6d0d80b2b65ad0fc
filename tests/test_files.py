"""Files are written completely or not at all; locks; errors of the file system."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from threading import Thread
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from sae_lightning import files
from sae_lightning.errors import UserError, WriteError
from sae_lightning.files import (
    SYSTEM_ERRORS,
    describe_system_error,
    hold_lock,
    read_free_space,
    refuse_link,
    remove_leftovers,
    write_atomically,
    write_json,
)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)), write_atomically(tmp_path / "file") as temporary:
        temporary.write_text("half of the n")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"  # the folder is created
    for text in ("old", "new"):
        before = path.read_text() if path.exists() else None
        with write_atomically(path) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


def hidden(error):
    """An error as torch raises it: its own, with the system's as context."""
    other = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    other.__context__ = error
    return other


def quoted(error):
    return RuntimeError(f"Error while serializing: I/O error: ... (os error {error.errno})")


@pytest.mark.parametrize("passed_on", [lambda error: error, hidden, quoted])
@pytest.mark.parametrize("number", sorted(SYSTEM_ERRORS))
def test_what_the_system_refuses_is_told_in_one_line_and_harms_nothing(tmp_path, number, passed_on):
    (tmp_path / "file").write_text("old")
    with pytest.raises(WriteError) as raised, write_atomically(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise passed_on(OSError(number, os.strerror(number)))
    why = os.strerror(number) if number != errno.ELOOP else "it is a symbolic link, .*"
    line = f"cannot write to {tmp_path}/file: {why}; the old file, if any, is intact"
    assert re.fullmatch(line, str(raised.value))
    assert (
        describe_system_error(raised.value)
        == f"{raised.value}; correct this and run the same command again"
    )
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_a_quota_and_a_stale_handle_are_among_the_system_errors():
    names = {errno.errorcode[number] for number in SYSTEM_ERRORS}
    assert {"ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EBUSY", "ENAMETOOLONG"} <= names
    assert {"ELOOP", "EISDIR"} <= names


def save_with_torch(path):
    with open(path, "wb") as file:
        torch.save({"x": torch.zeros(100_000)}, file)


WRITERS = {
    "torch": save_with_torch,
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
    "pyarrow": lambda path: pyarrow.parquet.write_table(pa.table({"x": [*range(100_000)]}), path),
    "pandas": lambda path: pd.DataFrame({"x": range(100_000)}).to_csv(path),
    "text": lambda path: path.write_text("x" * 100_000),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_a_write_error_whichever_library_writes(tmp_path, writer):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(WriteError) as raised, write_atomically(tmp_path / "file") as temporary:
            writer(temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ": File too large; " in str(raised.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("end", [SystemExit(130), KeyboardInterrupt()])
def test_ctrl_c_inside_torch_save_is_raised_as_such(tmp_path, end):
    class Interrupted:
        def write(self, data):
            raise end

    with pytest.raises(type(end)) as raised, write_atomically(tmp_path / "file"):
        torch.save({"x": torch.zeros(100_000)}, Interrupted())
    assert getattr(raised.value, "code", None) == getattr(end, "code", None)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_gone_is_named_and_not_made_again(tmp_path):
    with pytest.raises(WriteError, match="its folder is gone; was it deleted or renamed"):
        write_json(tmp_path / "run" / "checkpoints" / "last.json", {})
    assert os.listdir(tmp_path) == []


def test_no_write_follows_a_link(tmp_path):
    """Neither at the target nor at the temporary names of version 0.1.0."""
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    for name in ("page.html", ".page.html.tmp", ".page.html.tmp~"):
        (folder / name).symlink_to(victim)
    with write_atomically(folder / "page.html") as temporary:
        assert temporary.parent.stat().st_mode & 0o777 == 0o700, "nobody can plant a link there"
        assert re.fullmatch(r"\.page\.html\..{8}\.tmp", temporary.parent.name)
        temporary.write_text("new")
    assert (folder / "page.html").read_text() == "new"
    assert not (folder / "page.html").is_symlink()
    remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == [".page.html.tmp~", "page.html"]
    assert victim.read_text() == "mine"


def test_a_link_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "sae").symlink_to(tmp_path)
    with pytest.raises(UserError, match="sae is a symbolic link, .*: remove it, or put its target"):
        refuse_link(tmp_path / "sae")
    refuse_link(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link", "hard link"])
def test_a_lock_empties_nothing_and_follows_no_link(tmp_path, kind):
    path, victim = tmp_path / "lock", tmp_path / "victim"
    victim.write_text("mine")
    if kind == "link":
        path.symlink_to(victim)
        with pytest.raises(OSError) as raised, hold_lock(path):
            pass
        assert raised.value.errno == errno.ELOOP
    else:
        path.write_text("mine") if kind == "file" else os.link(victim, path)
        with hold_lock(path):
            assert path.read_text() == "mine"
    assert victim.read_text() == "mine"


def test_a_lock_on_a_file_that_has_been_replaced_is_not_held(tmp_path, monkeypatch):
    def removed(file, blocking):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").write_text("another's")
        return True

    monkeypatch.setattr(files, "lock_descriptor", removed)
    with pytest.raises(BlockingIOError), hold_lock(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "another's"


def test_the_lock_of_another_folder_under_the_same_name_stays(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    with hold_lock(run / "lock"):
        run.rename(moved)
        run.mkdir()
        other = hold_lock(run / "lock")
        other.__enter__()
    assert (run / "lock").exists()
    other.__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_nobody_is_kept_out_and_no_leftover_is_removed(
    tmp_path, monkeypatch, number
):
    def refuse(file, blocking):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "lock_descriptor", refuse)
    with hold_lock(tmp_path / "lock") as locked, hold_lock(tmp_path / "lock"):
        assert locked is False
    with write_atomically(tmp_path / "file") as temporary:
        temporary.write_text("new")
        remove_leftovers(tmp_path)
    assert (tmp_path / "file").read_text() == "new"


def test_leftovers_of_a_killed_writer_are_removed_and_those_of_a_live_one_are_not(tmp_path):
    code = f"""
from pathlib import Path
from sae_lightning.files import write_atomically
with write_atomically(Path({str(tmp_path / "file")!r})) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"writing\n"
    remove_leftovers(tmp_path)
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "file").read_text() == "half"
    other.kill()
    other.communicate()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_closed_output_pipe_is_reported_and_the_run_goes_on(tmp_path):
    code = f"""
from pathlib import Path
from sae_lightning.terminal import console
for number in range(2_000):
    console.print(number)
Path({str(tmp_path / "end")!r}).touch()
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"the output pipe was closed: going on without output\n"
    run.stderr.close()
    assert (run.wait(), os.listdir(tmp_path)) == (0, ["end"])


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert read_free_space(tmp_path / "not" / "yet") > 0


def test_a_lock_is_held_by_one_and_lifted_with_its_owner(tmp_path):
    path = tmp_path / "lock"
    code = f"""
from pathlib import Path
from sae_lightning.files import hold_lock
held = hold_lock(Path({str(path)!r}))
held.__enter__()
print("locked", flush=True)
input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(BlockingIOError), hold_lock(path):
        pass
    other.kill()
    other.communicate()
    assert path.exists()
    with hold_lock(path), pytest.raises(BlockingIOError), hold_lock(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_is_lifted_in_any_thread_and_when_it_is_forgotten(tmp_path):
    held = hold_lock(tmp_path / "lock")
    held.__enter__()
    with pytest.raises(BlockingIOError), hold_lock(tmp_path / "lock"):
        pass
    thread = Thread(target=held.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    forgotten = hold_lock(tmp_path / "lock")
    forgotten.__enter__()
    del forgotten
    with hold_lock(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_json_file_holds_null_where_a_number_is_none(tmp_path):
    class Named(NamedTuple):
        x: float
        y: list

    nan, inf = float("nan"), float("inf")
    content = {"a": nan, "b": {"c": [1.5, -inf, (inf, 2)]}, "d": Named(nan, [np.float64("nan")])}
    write_json(tmp_path / "a.json", content)
    expected = {"a": None, "b": {"c": [1.5, None, [None, 2]]}, "d": {"x": None, "y": [None]}}
    assert json.loads((tmp_path / "a.json").read_text()) == expected
