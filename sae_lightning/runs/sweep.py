"""What runs and multiruns need around their jobs; Hydra calls it (see conf/config.yaml)."""

import atexit
import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from yaml import YAMLError

from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file, write_atomically
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs.arguments import check_sweep, count_values
from sae_lightning.runs.cli import DEBUG, describe_error, format_error, remove_unused_folder
from sae_lightning.runs.folders import make_unique_folder, read_sweep_runs
from sae_lightning.runs.jobs import CONFIG_FILE, is_sweep, make_jobs, read_overrides
from sae_lightning.runs.saved import parse_scalars
from sae_lightning.terminal import (
    console,
    format_command,
    make_visible,
    quote_setting,
    shorten_path,
)

HYDRA_RECORD = "multirun.yaml"  # what Hydra keeps of a sweep


class Sweep(Callback):
    """A folder for each run or multirun; of a multirun, all jobs are checked before the first, and
    a report ends them."""

    def __init__(self):
        self.resuming = False

    def on_run_start(self, config: DictConfig, **_) -> None:
        """Give a plain run its folder."""
        with _exit_on_errors(read_overrides(config.hydra)):
            _make_new_folder(config, "run")

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        """Name the jobs' folders after what is swept, and end here if any config is wrong."""
        with _exit_on_errors(read_overrides(config.hydra)):
            self._start(config)

    def _start(self, config: DictConfig) -> None:
        _make_new_folder(config, "sweep")
        _refuse_special_files(Path(config.hydra.sweep.dir))
        self._keep_record(Path(config.hydra.sweep.dir))
        loader = GlobalHydra.instance().config_loader()
        parse = OverridesParser.create(loader).parse_overrides
        typed = parse(read_overrides(config.hydra))
        check_sweep(typed, config.hydra.sweeper)
        params = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
        # what is typed beats what a preset says, and the last of all that is given twice
        parsed = list({o.key_or_group: o for o in parse(params) + typed}.values())
        same = [o.key_or_group for o in parsed if not _has_several_values(o)]
        excluded = ",".join(f"'{key}'" for key in same)
        with read_write(config):  # each job is composed with these
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"
            )
        if config.resume and is_sweep(Path(config.resume)):
            self.resuming = True
            self._look_at_record(loader)
        sweeper, launcher = config.hydra.sweeper, config.hydra.launcher._target_
        if not sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
            return  # another sweeper chooses as it goes
        if launcher.endswith(".OnePassLauncher") and sweeper.max_batch_size is None:
            return  # it checks all jobs itself, and more of them
        for number, overrides in enumerate(BasicSweeper.split_arguments(parsed, None)[0]):
            with _exit_on_errors(overrides):
                _check_job(loader.load_sweep_config(config, overrides), number, overrides)

    def _keep_record(self, folder: Path) -> None:
        """Keep the record of an earlier sweep in `folder`, which Hydra is about to write over."""
        if (folder / CONFIG_FILE).exists():
            raise UserError(
                f"hydra.sweep.dir={folder}: holds a run; a sweep needs a folder of its own"
            )
        self.record, self.kept = folder / HYDRA_RECORD, None
        self.runs = sorted(folder.glob(f"*/{CONFIG_FILE}"))
        with suppress(OSError, ValueError):
            self.kept = read_regular_file(self.record)
            self._put_record_back()  # as a file of its own, whatever other name it had
        atexit.register(self._put_record_back)

    def _put_record_back(self) -> None:
        """Let the record be what it was, unless a run has been added to those in the folder."""
        folder = self.record.parent
        if sorted(folder.glob(f"*/{CONFIG_FILE}")) != self.runs:
            return
        if self.kept is None:
            self.record.unlink(missing_ok=True)
            remove_unused_folder(folder)
        else:
            with write_atomically(self.record) as temporary:
                temporary.write_text(self.kept, "utf8")

    def _look_at_record(self, loader: ConfigLoader) -> None:
        """Say which jobs are not in the folder of a resumed sweep: only what has begun can be."""
        try:
            words = parse_scalars(self.record, self.kept or "")
            given = [text for name, text in words if name == "hydra.overrides.task"]
            parsed = OverridesParser.create(loader).parse_overrides(given)
            jobs = math.prod(count_values(override) for override in parsed)
            missing = jobs - len(self.runs)
            known = f"{missing} of the {jobs} jobs"
        except UserError:
            raise
        except (ValueError, ArithmeticError, RecursionError, YAMLError, HydraException):
            return  # a record of something else, or damaged
        if missing > 0 and given:
            place = quote_setting("hydra.sweep.dir", shorten_path(self.record.parent))
            console.print(
                f"{known} of this sweep never began and are not resumed: give "
                f"its own command again, with {place}"
            )

    def on_job_start(self, config: DictConfig, **_) -> None:
        """Put the record of a resumed sweep back: killed from here on, it is still there."""
        if self.resuming:
            self._put_record_back()

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        """Write the report, and end with an error if a run has no result."""
        folder = Path(config.hydra.sweep.dir)
        if not is_sweep(folder):
            return
        runs = read_sweep_runs(folder)
        try:
            write_report(folder, runs)
        except Exception as error:  # the runs are there, and what failed has to be told
            again = format_command("analyze.py", task="sweep", run=shorten_path(folder))
            said = make_visible(f"the report could not be written ({error}); again: {again}")
            sys.stderr.write(said + "\n")
        failed = sum(run.metrics is None for run in runs)
        if failed:
            sys.exit(f"error: {failed} of the {len(runs)} jobs failed, see above")


@contextmanager
def _exit_on_errors(overrides: Iterable[str]) -> Iterator[None]:
    """End the process with an error's line: Hydra turns a callback's exceptions into warnings."""
    try:
        yield
    except Exception as error:
        message = describe_error(error, list(overrides))
        if message is None or os.environ.get(DEBUG):
            traceback.print_exc()
            sys.exit(1)
        sys.exit(format_error(message))


def _make_new_folder(config: DictConfig, kind: str) -> None:
    """Make the folder of a new run or sweep that is named after the time, which another process may
    have taken in the same second. A folder that the user names is as it is."""
    place = config.hydra[kind]
    if f"${{{kind}_folder:" not in OmegaConf.to_container(place, resolve=False)["dir"]:
        return
    if place.dir == config.resume:
        return
    folder = make_unique_folder(Path(place.dir))
    with read_write(config):
        place.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.{kind}.dir={folder}")  # of each job


def _refuse_special_files(sweep: Path) -> None:
    """UserError if the folder of a sweep holds a link, a pipe or a device: Hydra and sweepers write
    through it, or wait for ever."""
    for file in sweep.iterdir() if sweep.is_dir() else ():
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise UserError(
                f"{file} is a symbolic link, through which files elsewhere could be overwritten, "
                "or a pipe: remove it, or choose another folder with hydra.sweep.dir=..."
            )


def _has_several_values(override: Override) -> bool:
    """Whether an override has several values: not so `choice(x)`, which arguments.py may write."""
    if override.is_choice_sweep():
        return len(override.value().list) > 1
    return override.is_sweep_override()


def _check_job(cfg: DictConfig, number: int, overrides: list[str]) -> None:
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)  # for ${hydra:job.num}
        del cfg["hydra"]
    make_jobs(cfg, Path(), overrides, Path())
