"""Runs on failing disks: full, folders that move, no file locks, planted symlinks."""

import errno
import os
import resource
import shutil
import signal

import pytest
import torch
from test_run import interrupt, resume

from sae_lightning import UserError, files
from sae_lightning.errors import WriteError
from sae_lightning.runs import devices, passes, run
from sae_lightning.training import checkpoints
from sae_lightning.training.callbacks import checkpoint
from sae_lightning.training.logging import HeadLog, HParams


@pytest.fixture
def limit():
    """limit(bytes) -> from now on no file may grow larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_says_how_to_continue(job, monkeypatch, limit):
    tiny = job("run")
    with monkeypatch.context() as patch:
        interrupt(patch, 12, lambda: limit(10_000))
        with pytest.raises(UserError) as error:
            passes.train_jobs([tiny])
    limit(resource.RLIM_INFINITY)
    assert str(error.value) == (
        f"cannot write to {tiny.folder}/checkpoints/stream-20.pt: File too large; the old file, "
        "if any, is intact; correct this and continue with: "
        f"python train.py resume={tiny.folder}"
    )
    assert [path for path in tiny.folder.rglob("*.tmp")] == []
    (metrics,) = resume(tiny)
    assert metrics["l0"] > 0


def test_curves_that_cannot_be_written_are_told(tmp_path, limit):
    log = HeadLog(tmp_path, HParams({}, {}), resumed_at=None)
    limit(0)
    log.add_scalars({"train/l0": 1.0}, 64)
    for write_to_disk in (log.flush, log.close):
        with pytest.raises(WriteError, match=r"cannot write to .*events.*: File too large"):
            write_to_disk()


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["deleted", "renamed", "made anew"])
def test_a_folder_that_is_deleted_or_renamed_under_its_run_is_noticed(
    job, monkeypatch, tmp_path, gone
):
    tiny, moved = job("run"), tmp_path / "moved"

    def go():
        if gone == "deleted":
            shutil.rmtree(tiny.folder)
        else:
            tiny.folder.rename(moved)
        if gone == "made anew":
            tiny.folder.mkdir()

    with monkeypatch.context() as patch:
        interrupt(patch, 12, go)
        message = "run was deleted or renamed while its run was writing"
        with pytest.raises(UserError, match=message) as error:
            passes.train_jobs([tiny])
    assert "continue with: " not in str(error.value), "there is nothing at that place"
    assert not tiny.folder.exists() or os.listdir(tiny.folder) == []
    if moved.exists():
        tiny.folder = moved
        resume(tiny)
        assert (moved / "metrics.json").is_file()


@pytest.mark.slow
def test_a_folder_that_goes_between_its_checkpoint_and_its_sae_is_not_made_again(
    job, monkeypatch, tmp_path
):
    tiny, export_head = job("run"), checkpoint.export_head

    def late(head):
        tiny.folder.rename(tmp_path / "moved")
        export_head(head)

    monkeypatch.setattr(checkpoint, "export_head", late)
    with pytest.raises(UserError, match="run/sae/cfg.json: its folder is gone; was it deleted or"):
        passes.train_jobs([tiny])
    assert not tiny.folder.exists()


def test_a_second_ctrl_c_inside_a_save_ends_the_run_at_once(job, monkeypatch):
    tiny = job("run")

    class Impatient:
        def write(self, data):
            os.kill(os.getpid(), signal.SIGINT)
            return len(data)

    def save(content, path):
        torch.save(content, Impatient())

    interrupt(monkeypatch, 12, lambda: os.kill(os.getpid(), signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save", save)
        with pytest.raises(SystemExit) as end:
            passes.train_jobs([tiny])
    assert end.value.code == 130
    assert [path for path in tiny.folder.rglob("*.tmp")] == []


def test_on_a_file_system_without_locks_a_run_says_so_once(job, monkeypatch, capsys):
    def refuse(file, blocking):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "lock_descriptor", refuse)
    monkeypatch.setattr(devices, "run_pass", lambda run_plan: [{} for _ in run_plan.jobs])
    passes.train_jobs([job("a"), job("b")])
    assert capsys.readouterr().out.count("a has no locks: nothing keeps another process from") == 1


@pytest.mark.parametrize("name", ["sae", "checkpoints"])
def test_a_link_in_place_of_a_folder_of_a_run_is_refused_before_the_llm_is_loaded(
    job, monkeypatch, tmp_path, name
):
    tiny = job("run")
    tiny.folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tiny.folder / name).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(run, "run_pass", None)
    with pytest.raises(
        UserError, match=f"run/{name} is a symbolic link, through which files elsewhere"
    ):
        passes.train_jobs([tiny])
    assert os.listdir(tiny.folder) == [name]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_link_in_place_of_a_lock_is_not_followed(job, tmp_path):
    tiny = job("run")
    tiny.folder.mkdir()
    (tmp_path / "victim").write_text("mine")
    (tiny.folder / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"cannot write to .*/run/\.lock: it is a symbolic link"):
        passes.train_jobs([tiny])
    assert (tmp_path / "victim").read_text() == "mine"


def test_what_a_killed_run_left_half_written_is_removed_when_it_goes_on(job, monkeypatch):
    tiny = job("run")
    left = tiny.folder / "checkpoints" / ".last.ckpt.abcdefgh.tmp"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    (left / "last.ckpt").write_bytes(b"half")
    (left.parent / ".last.ckpt.tmp").touch()  # as version 0.1.0 left it
    monkeypatch.setattr(devices, "run_pass", lambda run_plan: [{} for _ in run_plan.jobs])
    passes.train_jobs([tiny])
    assert os.listdir(left.parent) == []
