"""What run folders say about their runs."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sae_lightning.errors import UserError
from sae_lightning.files import atomically, write_json
from sae_lightning.report.sweep_table import SweepRun
from sae_lightning.runs.jobs import (
    CONFIG_FILE,
    ELSEWHERE,
    Job,
    read_job,
    resolved_yaml,
    run_folders,
)
from sae_lightning.training.settings import failure_path

METRICS_FILE = "metrics.json"
_mine: set[Path] = set()  # folders that this process has claimed


def metrics(folder: Path) -> dict | None:
    """`metrics.json` of a run that came to its end."""
    return _json(folder / METRICS_FILE)  # damaged: the last checkpoint is there to score again


def failure(folder: Path) -> dict | None:
    """Why a run failed (`reason`), and whether it would do so again (`diverged`)."""
    return _json(failure_path(folder))


def finished(job: Job) -> dict | None:
    """The metrics of a resumed run that had come to its end."""
    return metrics(job.folder) if job.resumed else None


def begin(job: Job) -> None:
    """Write down the settings of a run, and forget that it failed before."""
    with atomically(job.folder / CONFIG_FILE) as temporary:
        temporary.write_text(resolved_yaml(job), encoding="utf8")
    failure_path(job.folder).unlink(missing_ok=True)


def note_failure(job: Job, reason: str) -> None:
    """Write down why a run failed, unless it has said so itself or has come to its end."""
    if failure(job.folder) is None and metrics(job.folder) is None:
        write_json(failure_path(job.folder), {"reason": reason, "diverged": False})


def sweep_runs(folder: Path) -> list[SweepRun]:
    """What a sweep's report says about each of its runs; one whose settings cannot be read has
    failed."""
    return [_sweep_run(run) for run in run_folders(folder)]


def _sweep_run(folder: Path) -> SweepRun:
    try:
        job, failed = read_job(folder), failure(folder)
    except UserError as error:
        return SweepRun(folder, overrides=[], metrics=None, failure=str(error))
    return SweepRun(
        folder=folder,
        overrides=job.overrides,
        metrics=metrics(folder),
        failure=failed["reason"] if failed else None,
        settings=job.config.flat(),
    )


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError):
        return None


@contextmanager
def claimed(folders: list[Path]) -> Iterator[None]:
    """Keep other processes out of the folders; the system lifts the claim if we die.

    What this process has claimed already it may claim again: a sweep claims the runs of all passes.
    """
    with ExitStack() as locks:
        for folder in {folder.absolute() for folder in folders} - _mine:
            locks.enter_context(_claimed(folder))
            _mine.add(folder)
            locks.callback(_mine.discard, folder)
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
                f"folder with {ELSEWHERE}"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
