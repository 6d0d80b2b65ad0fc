"""Hydra callback that makes run folders, checks all jobs of a sweep, and writes its report."""

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
from sae_lightning.runs.cli import DEBUG, explain_error, format_error, remove_unused_folder
from sae_lightning.runs.folders import HYDRA_RECORD, make_unique_folder, read_sweep_runs
from sae_lightning.runs.jobs import CONFIG_FILE, is_sweep, make_jobs, read_overrides
from sae_lightning.runs.stable_features import add_stable_features
from sae_lightning.runs.untrusted_yaml import parse_scalars
from sae_lightning.terminal import (
    console,
    format_command,
    make_visible,
    quote_setting,
    shorten_path,
)


class Sweep(Callback):
    """Makes the folder of a run or multirun, and writes the report of a multirun. Checks all jobs
    first, unless the launcher does or a search chooses them. conf/config.yaml installs it."""

    def __init__(self):
        self.resuming = False
        """Whether this multirun resumes a sweep."""

    def on_run_start(self, config: DictConfig, **_) -> None:
        """Make the folder of a plain run."""
        with _exit_on_errors(read_overrides(config.hydra)):
            _refuse_expansion(config, "it adds runs to a sweep; give -m before the settings")
            _make_new_folder(config, "run")

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        """Make the sweep's folder, set how its run folders are named, and check the jobs."""
        with _exit_on_errors(read_overrides(config.hydra)):
            self._start(config)

    def _start(self, config: DictConfig) -> None:
        """`on_multirun_start`, with errors as exceptions."""
        _make_new_folder(config, "sweep")
        _refuse_special_files(Path(config.hydra.sweep.dir))
        self._remember_record(Path(config.hydra.sweep.dir))
        loader = GlobalHydra.instance().config_loader()
        parse = OverridesParser.create(loader).parse_overrides
        typed_overrides = parse(read_overrides(config.hydra))
        check_sweep(typed_overrides, config.hydra.sweeper)
        params = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
        # typed overrides beat those that a preset has in hydra.sweeper.params
        overrides = list({o.key_or_group: o for o in parse(params) + typed_overrides}.values())
        _refuse_several_seeds(config, overrides)
        constant = [f"'{o.key_or_group}'" for o in overrides if not _has_several_values(o)]
        with read_write(config):  # each job is composed with this config
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(constant)}]"
            )
        if config.resume and is_sweep(Path(config.resume)):
            self.resuming = True
            self._print_missing_jobs(loader)
        sweeper, launcher = config.hydra.sweeper, config.hydra.launcher._target_
        if not launcher.endswith(".OnePassLauncher"):
            _refuse_expansion(
                config,
                "only hydra/launcher=one_pass (the default) adds seeds and controls; with another, "
                "write model.seed=0,1,2 and model.control=null,pca",
            )
        if not sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
            return  # a search, whose jobs are not known yet
        if launcher.endswith(".OnePassLauncher") and sweeper.max_batch_size is None:
            return  # this launcher checks all jobs itself, more thoroughly
        (grid,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        for number, job_overrides in enumerate(grid):
            with _exit_on_errors(job_overrides):
                _check_job(loader.load_sweep_config(config, job_overrides), number, job_overrides)

    def _remember_record(self, folder: Path) -> None:
        """Keep an earlier sweep's multirun.yaml in memory: Hydra will overwrite it in `folder`.
        UserError if `folder` holds a run."""
        if (folder / CONFIG_FILE).exists():
            raise UserError(
                f"hydra.sweep.dir={folder}: holds a run; a sweep needs a folder of its own"
            )
        self.record_file, self.record = folder / HYDRA_RECORD, None
        self.config_files = sorted(folder.glob(f"*/{CONFIG_FILE}"))  # one for each run so far
        with suppress(OSError, ValueError):
            self.record = read_regular_file(self.record_file)
            self._restore_record()  # as a new file: Hydra would write through a hard link
        atexit.register(self._restore_record)  # after Hydra has overwritten it

    def _restore_record(self) -> None:
        """Restore multirun.yaml (remove Hydra's if there was none), unless a run has been added."""
        folder = self.record_file.parent
        if sorted(folder.glob(f"*/{CONFIG_FILE}")) != self.config_files:
            return
        if self.record is None:
            self.record_file.unlink(missing_ok=True)
            remove_unused_folder(folder)
        else:
            with write_atomically(self.record_file) as temporary:
                temporary.write_text(self.record, "utf8")

    def _print_missing_jobs(self, loader: ConfigLoader) -> None:
        """Print how many jobs of a resumed sweep never began: they have no folder to resume."""
        try:
            entries = parse_scalars(self.record_file, self.record or "")
            overrides = [text for name, text in entries if name == "hydra.overrides.task"]
            parsed = OverridesParser.create(loader).parse_overrides(overrides)
            jobs = math.prod(count_values(override) for override in parsed)
            missing = jobs - len(self.config_files)  # too low if the sweep added seeds or controls
            missing_jobs = f"{missing} of the {jobs} jobs"  # ValueError for thousands of digits
        except UserError:
            raise
        except (ValueError, ArithmeticError, RecursionError, YAMLError, HydraException):
            return  # the record is damaged, or not Hydra's
        if missing > 0 and overrides:
            folder = quote_setting("hydra.sweep.dir", shorten_path(self.record_file.parent))
            console.print(
                f"{missing_jobs} of this sweep never began and are not resumed: run the sweep's "
                f"command again, with {folder}"
            )

    def on_job_start(self, config: DictConfig, **_) -> None:
        """Restore multirun.yaml of a resumed sweep, which Hydra has overwritten by now."""
        if self.resuming:
            self._restore_record()

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        """Write the report, and exit with an error if a run has no result."""
        folder = Path(config.hydra.sweep.dir)
        if not is_sweep(folder):
            return
        runs = read_sweep_runs(folder)
        try:
            write_report(folder, add_stable_features(folder, runs))
        except Exception as error:  # the runs are saved, and failed ones must still be reported
            command = format_command("analyze.py", task="sweep", run=shorten_path(folder))
            line = make_visible(f"the report could not be written ({error}); again: {command}")
            sys.stderr.write(line + "\n")
        failed = sum(run.metrics is None for run in runs)
        if failed:
            sys.exit(f"error: {failed} of the {len(runs)} jobs failed, see above")


@contextmanager
def _exit_on_errors(overrides: Iterable[str]) -> Iterator[None]:
    """Exit with a one-line error: Hydra would turn a callback's exception into a warning."""
    try:
        yield
    except Exception as error:
        message = explain_error(error, list(overrides))
        if message is None or os.environ.get(DEBUG):
            traceback.print_exc()
            sys.exit(1)
        sys.exit(format_error(message))


def _refuse_expansion(config: DictConfig, reason: str) -> None:
    """UserError with this reason if `sweep.seeds` or `sweep.controls` ask for more runs."""
    seeds, controls = config.sweep.seeds, config.sweep.controls
    if seeds > 1 or controls:
        setting = f"sweep.seeds={seeds}" if seeds > 1 else "sweep.controls=true"
        raise UserError(f"{setting}: {reason}")


def _refuse_several_seeds(config: DictConfig, overrides: Iterable[Override]) -> None:
    """UserError if seeds are swept and `sweep.seeds` also adds seeds."""
    swept = [o for o in overrides if _has_several_values(o)]
    lines = [o.input_line for o in swept if o.key_or_group in ("seed", "model.seed")]
    if lines and config.sweep.seeds > 1:
        raise UserError(
            f"sweep.seeds={config.sweep.seeds}: it trains each SAE with several seeds, and "
            f"{lines[0]} with others: leave one of them out"
        )


def _make_new_folder(config: DictConfig, kind: str) -> None:
    """Make the folder of a new run or sweep (`kind`: `run` or `sweep`), under another name if
    another process has just made that folder. A folder that the user names is left alone."""
    hydra_output = config.hydra[kind]
    # conf/config.yaml picks the folder with the resolver run_folder or sweep_folder
    if f"${{{kind}_folder:" not in OmegaConf.to_container(hydra_output, resolve=False)["dir"]:
        return
    if hydra_output.dir == config.resume:  # a resumed run or sweep stays in its folder
        return
    folder = make_unique_folder(Path(hydra_output.dir))
    with read_write(config):
        hydra_output.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.{kind}.dir={folder}")  # for every job


def _refuse_special_files(sweep: Path) -> None:
    """UserError if the folder of a sweep holds a symbolic link, a pipe or a device: Hydra and
    sweepers would write through it, or hang."""
    files = sweep.iterdir() if sweep.is_dir() else ()
    for file in files:
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise UserError(
                f"{file} is a symbolic link, through which files elsewhere could be overwritten, "
                "or a pipe: remove it, or choose another folder with hydra.sweep.dir=..."
            )


def _has_several_values(override: Override) -> bool:
    """Whether an override has several values; `choice(x)`, written by arguments.py, has one."""
    if override.is_choice_sweep():
        return len(override.value().list) > 1
    return override.is_sweep_override()


def _check_job(cfg: DictConfig, number: int, overrides: list[str]) -> None:
    """UserError if a job's composed config is wrong."""
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)  # resolves ${hydra:job.num}
        del cfg["hydra"]
    make_jobs(cfg, Path(), overrides, Path())  # any folder: the jobs are only checked
