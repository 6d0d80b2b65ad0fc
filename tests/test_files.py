"""A file is there completely or not at all."""

import errno
import os
import subprocess
import sys
from threading import Thread

import pytest

from sae_lightning.errors import UserError
from sae_lightning.files import atomically, free_space, lock


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)), atomically(tmp_path / "file") as temporary:
        temporary.write_text("half of the n")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"  # made on the way
    for text in ("old", "new"):
        before = path.read_text() if path.exists() else None
        with atomically(path) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),  # torch.save's way
    ],
)
def test_a_full_disk_is_told_in_one_line_and_harms_nothing(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(UserError, match="no space left for .*file: .* free some space") as raised,
        atomically(tmp_path / "file") as temporary,
    ):
        temporary.write_text("half")
        raise error
    assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert free_space(tmp_path / "not" / "yet") > 0


def test_a_lock_is_held_by_one_and_lifted_with_its_owner(tmp_path):
    path = tmp_path / "lock"
    code = f"""
from pathlib import Path
from sae_lightning.files import lock
held = lock(Path({str(path)!r}))
held.__enter__()
print("locked", flush=True)
input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(BlockingIOError), lock(path):
        pass
    other.kill()
    other.communicate()
    assert path.exists()
    with lock(path), pytest.raises(BlockingIOError), lock(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_is_lifted_in_any_thread_and_when_it_is_forgotten(tmp_path):
    held = lock(tmp_path / "lock")
    held.__enter__()
    with pytest.raises(BlockingIOError), lock(tmp_path / "lock"):
        pass
    thread = Thread(target=held.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    forgotten = lock(tmp_path / "lock")
    forgotten.__enter__()
    del forgotten
    with lock(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == []
