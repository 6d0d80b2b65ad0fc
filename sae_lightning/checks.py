"""What can be known to be wrong with a run before anything expensive starts."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import torch

from sae_lightning.config import CONFIG_FILE, Job
from sae_lightning.errors import UserError
from sae_lightning.files import free_space
from sae_lightning.llm.load import device, shape
from sae_lightning.llm.packaged import Shape
from sae_lightning.llm.sites import Site
from sae_lightning.training.settings import Accelerator, checkpoint_path

METRICS_FILE = "metrics.json"


def check(jobs: list[Job]) -> tuple[list[Site], int]:
    """The site of each job and the updates that are already done, or the first thing wrong."""
    config = jobs[0].config
    assert len({job.config.stream_key() for job in jobs}) == 1, "jobs must share the stream half"
    device(config.llm)
    if config.trainer.accelerator is Accelerator.gpu and not torch.accelerator.is_available():
        raise UserError("trainer.accelerator=gpu: no GPU found; use trainer=cpu or trainer=auto")
    for job in jobs:
        _check_folder(job)
    steps_done = [_steps_done(job) if job.resumed else 0 for job in jobs]
    assert len(set(steps_done)) == 1
    llm = shape(config.llm)
    if llm.context is not None and config.data.context > llm.context:
        raise UserError(
            f"data.context={config.data.context}: {config.llm.name} takes at most {llm.context} "
            "tokens; lower it"
        )
    for job in jobs:
        _check_space(job, llm)
    return [job.config.layer.within(llm.layers) for job in jobs], steps_done[0]


def finished(job: Job) -> dict | None:
    """The metrics of a resumed run that had come to its end, else None."""
    file = job.folder / METRICS_FILE
    if not job.resumed or not file.is_file():
        return None
    try:
        return json.loads(file.read_text("utf8"))
    except ValueError:  # damaged: the last checkpoint is still there to score again
        return None


@contextmanager
def claimed(folders: list[Path]) -> Iterator[None]:
    """Keep other processes out of the run folders; the system lifts the claim if we die."""
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(_claimed(folder))
        yield


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training there; wait for it, or choose another "
                "folder with hydra.run.dir=..."
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_folder(job: Job) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    if not os.access(job.folder, os.W_OK):
        raise UserError(f"{job.folder} cannot be written to: choose another with hydra.run.dir=...")
    if not job.resumed and (job.folder / CONFIG_FILE).exists():
        raise UserError(
            f"{job.folder} already holds a run: continue it with resume={job.folder}, or choose "
            "another folder with hydra.run.dir=..."
        )


def _check_space(job: Job, llm: Shape) -> None:
    """A checkpoint holds weights and two moments of Adam, and the shuffle pool; twice while it
    is being replaced."""
    features, pool = job.config.model.features, job.config.data.pool
    weights = 4 * (2 * llm.width * features + features + llm.width)
    needed = 2 * (3 * weights + 4 * llm.width * pool) + 2 * weights
    kept = [checkpoint_path(job.folder), *job.folder.glob("sae/*")]
    needed -= sum(file.stat().st_size for file in kept if file.is_file())
    free = free_space(job.folder)
    if free < needed:
        raise UserError(
            f"no space left: checkpoints in {job.folder} need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; free some, or choose another disk with "
            "hydra.run.dir=..."
        )


def _steps_done(job: Job) -> int:
    """Updates in the checkpoint of a resumed run; 0 if it was killed before the first one."""
    path = checkpoint_path(job.folder)
    if not path.is_file():
        return 0
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        steps, settings = saved["global_step"], saved["settings"]
    except (
        RuntimeError,
        UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        BadZipFile,
        OSError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is truncated or not a checkpoint ({reason}); delete it to start the run "
            "again from its beginning"
        ) from error
    mine = job.config.identity()
    differing = sorted(k for k in mine | settings if mine.get(k) != settings.get(k))
    if differing:
        name = differing[0]
        raise UserError(
            f"{path} does not fit {CONFIG_FILE}: it was made with {name}={settings.get(name)}, not "
            f"{mine.get(name)}" + (f" ({len(differing)} settings differ)" * (len(differing) > 1))
        )
    return steps
