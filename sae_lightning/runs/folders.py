"""Makes, names and locks run folders; reads their metrics; records and reads failures."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_lightning.errors import UserError, WriteError
from sae_lightning.files import (
    LOCK_FILE,
    convert_write_errors,
    hold_lock,
    read_regular_file,
    refuse_link,
    remove_leftovers,
    write_atomically,
    write_json,
)
from sae_lightning.report.sweep_table import SweepRun
from sae_lightning.runs.jobs import (
    CONFIG_FILE,
    FOLDER_HINT,
    Job,
    format_config,
    list_run_folders,
    read_job,
)
from sae_lightning.terminal import console, phase
from sae_lightning.training.settings import locate_checkpoint, locate_failure

METRICS_FILE = "metrics.json"
HYDRA_RECORD = "multirun.yaml"  # Hydra's record of a sweep, in its folder
DENSITY_FILE = "density.safetensors"  # the share of held-out tokens on which each feature fires


def read_metrics(folder: Path) -> dict | None:
    """The content of `metrics.json`; None if the run did not finish or the file is damaged."""
    with suppress(UserError):  # damaged: resuming the run writes the file again
        return _read_metrics(folder)
    return None


def read_failure(folder: Path) -> dict | None:
    """Why a run failed (`reason`), and whether it `diverged`: its loss or gradient was not finite,
    so that it would fail again. None if no record can be read."""
    with suppress(UserError):
        return _read_failure(folder)
    return None


def read_earlier_metrics(job: Job) -> dict | None:
    """The metrics of a resumed run that has already finished; None for any other run."""
    return read_metrics(job.folder) if job.resumed else None


def make_unique_folder(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, `path`-3 and so on if it exists. Processes that start
    at the same time get different folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, number = path, 1
    while True:
        try:
            # parents=True, because another process may have just removed the day's folder
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


def find_sweep_folder(folder: Path) -> Path | None:
    """The folder of the sweep that the run in `folder` belongs to; None for a plain run."""
    return folder.parent if (folder.parent / HYDRA_RECORD).is_file() else None


def name_with_day(folder: Path) -> str:
    """The name of a folder; in a day's folder, with the day, such as 2026-01-31/12-00-00."""
    day = re.fullmatch(r"\d{4}-\d\d-\d\d", folder.parent.name)
    return f"{day[0]}/{folder.name}" if day else folder.name


def begin_run(job: Job) -> None:
    """Write the settings of a run, and delete the record of an earlier failure."""
    with write_atomically(job.folder / CONFIG_FILE) as temporary:
        temporary.write_text(format_config(job), encoding="utf8")
    locate_failure(job.folder).unlink(missing_ok=True)


def forget_empty_run(job: Job) -> bool:
    """If a new plain run has written nothing but its settings, delete them and return True."""
    is_empty = {file.name for file in job.folder.glob("*")} <= {CONFIG_FILE, LOCK_FILE}
    if not is_empty or job.resumed or job.multirun:
        return False
    (job.folder / CONFIG_FILE).unlink(missing_ok=True)
    return True


def record_failure(job: Job, reason: str) -> None:
    """Record why a run failed, unless a reason is recorded already, the run has finished, its
    folder is gone or the disk is full."""
    exists = (job.folder / CONFIG_FILE).is_file()
    if exists and read_failure(job.folder) is None and read_metrics(job.folder) is None:
        with suppress(WriteError):
            write_json(locate_failure(job.folder), {"reason": reason, "diverged": False})


def record_refusal(job: Job, reason: str) -> None:
    """Record why a job could not start, for the report, unless its folder holds another run."""
    if not (job.folder / CONFIG_FILE).exists():
        begin_run(job)
        record_failure(job, reason)


def read_sweep_runs(folder: Path) -> list[SweepRun]:
    """The runs of a sweep, for its report."""
    folders, runs = list_run_folders(folder), []
    with phase("reading runs", total=len(folders)) as advance:
        for run in folders:
            runs.append(_read_sweep_run(run))
            advance(1)
    return runs


def _read_sweep_run(folder: Path) -> SweepRun:
    """A run of a sweep, marked as damaged if its files cannot be read."""
    try:
        job = read_job(folder, trusted=True)  # no LLM is loaded
    except UserError as error:
        return SweepRun(folder, overrides=[], metrics=None, failure=str(error), damaged=True)
    settings = job.config.to_flat_dict()
    run = SweepRun(folder, job.overrides, metrics=None, failure=None, settings=settings)
    try:
        failure = _read_failure(folder)
        return run._replace(
            metrics=_read_metrics(folder), failure=failure["reason"] if failure else None
        )
    except UserError as error:
        return run._replace(failure=str(error), damaged=True)


def _read_metrics(folder: Path) -> dict | None:
    """The content of `metrics.json`; None if there is no file, UserError if it is damaged."""
    path = folder / METRICS_FILE
    content = read_json(path)
    if content is None:
        return None
    try:
        # "fates": numbers of features that stayed, died, ... since a warm start
        for name in ("held_out", "training", "start", "fates", "before_kl"):
            if name in content or name in ("held_out", "training"):  # the others are optional
                content[name] = {key: _read_number(x) for key, x in content.get(name, {}).items()}
        valid = isinstance(content.get("tokens"), int | None)
        valid = valid and {"l0", "explained_variance"} <= content["held_out"].keys()
    except (AttributeError, TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise UserError(f"{path} is damaged: it does not hold the metrics of a run")
    return content


def _read_number(value: object) -> float:
    """A metric read from JSON; null, which stands for NaN and infinity, becomes NaN. TypeError for
    anything else but a number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    float(value)  # OverflowError for an int too large for a float
    return value


def _read_failure(folder: Path) -> dict | None:
    """The content of `failure.json`; None if there is no file, UserError if it is damaged."""
    path = locate_failure(folder)
    content = read_json(path)
    if content is None:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("reason"), str):
        raise UserError(f"{path} is damaged: it does not say why the run failed")
    return {"diverged": False} | content


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no file. UserError if it is not JSON."""
    try:
        return json.loads(read_regular_file(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it cannot be read as JSON") from error


@contextmanager
def claim_folders(folders: list[Path]) -> Iterator[None]:
    """Lock the folders against other processes until the block or this process ends, and remove
    temporary files that killed runs left there. UserError if one is locked."""
    unlocked = []
    with ExitStack() as locks:
        for folder in folders:
            try:
                with convert_write_errors(folder / LOCK_FILE):
                    is_locked = locks.enter_context(hold_lock(folder / LOCK_FILE))
                if not is_locked:  # the file system has no locks
                    unlocked.append(folder)
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another process is training there; wait for it, or choose another "
                    f"folder with {FOLDER_HINT}"
                ) from None
            saes = [folder / "sae", *folder.glob("sae-*")]
            subfolders = [*saes, locate_checkpoint(folder).parent]
            # the folder that the user named may be a link; a folder inside it may not
            is_in_sweep = folder.parent in folders
            for path in [folder, *subfolders] if is_in_sweep else subfolders:
                refuse_link(path)
            for path in (folder, *subfolders):
                remove_leftovers(path)
        if unlocked:
            console.print(
                f"the file system of {unlocked[0]} has no locks: nothing keeps another process "
                "from training in the same folder"
            )
        yield
