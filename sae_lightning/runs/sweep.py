"""What a multirun needs around its jobs; Hydra calls it (see conf/config.yaml)."""

import os
import sys
import traceback
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
from omegaconf.errors import OmegaConfBaseException

from sae_lightning.files import atomically
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs.cli import DEBUG, explain
from sae_lightning.runs.folders import sweep_runs
from sae_lightning.runs.jobs import is_sweep, jobs, run_folders
from sae_lightning.terminal import command, console, shown, visible

RECORD = "multirun.yaml"  # what Hydra keeps of a sweep


class Sweep(Callback):
    """Around the jobs of a multirun: all are checked before the first; a report ends them."""

    def __init__(self):
        self.record: tuple[Path, str] | None = None

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        """Name the jobs' folders after what is swept, and end here if any config is wrong."""
        _refuse_links(Path(config.hydra.sweep.dir))
        loader = GlobalHydra.instance().config_loader()
        params = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
        given = params + OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        parsed = OverridesParser.create(loader).parse_overrides(given)
        same = [o.key_or_group for o in parsed if not _varies(o)]
        excluded = ",".join(f"'{key}'" for key in same)
        with read_write(config):  # each job is composed with these
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"
            )
        if config.resume and is_sweep(Path(config.resume)):
            self._look_at_record(Path(config.hydra.sweep.dir), loader)
        sweeper, launcher = config.hydra.sweeper, config.hydra.launcher._target_
        if not sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
            return  # another sweeper chooses as it goes
        if launcher.endswith(".OnePassLauncher") and sweeper.max_batch_size is None:
            return  # it checks all jobs itself, and more of them
        for number, overrides in enumerate(BasicSweeper.split_arguments(parsed, None)[0]):
            try:
                _check_job(loader.load_sweep_config(config, overrides), number, overrides)
            except Exception as error:
                # Hydra turns a callback's exceptions into warnings, but not SystemExit
                message = explain(error, overrides)
                if message is None or os.environ.get(DEBUG):
                    traceback.print_exc()
                    sys.exit(1)
                sys.exit(visible(f"error: {message}"))

    def _look_at_record(self, folder: Path, loader: ConfigLoader) -> None:
        """Keep Hydra's record of a resumed sweep, which it is about to write over, and say which
        jobs are not in its folder: only what has begun can be resumed."""
        try:
            self.record = folder / RECORD, (folder / RECORD).read_text("utf8")
            given = OmegaConf.create(self.record[1]).hydra.overrides.task
            parsed = OverridesParser.create(loader).parse_overrides(list(given))
            jobs = len(BasicSweeper.split_arguments(parsed, None)[0])
        except (OSError, OmegaConfBaseException, HydraException):
            return  # no record, or one of a search
        missing = jobs - len(run_folders(folder))
        if missing > 0:
            console.print(
                f"{missing} of the {jobs} jobs of this sweep never began and are not resumed: give "
                f"its own command again, with hydra.sweep.dir={shown(folder)}"
            )

    def on_job_start(self, config: DictConfig, **_) -> None:
        """Put Hydra's record of a resumed sweep back."""
        if self.record:
            path, text = self.record
            with atomically(path) as temporary:
                temporary.write_text(text, "utf8")

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        """Write the report, and end with an error if a run has no result."""
        folder = Path(config.hydra.sweep.dir)
        if not is_sweep(folder):
            return
        runs = sweep_runs(folder)
        try:
            write_report(folder, runs)
        except Exception as error:  # the runs are there, and what failed has to be told
            again = command("analyze.py", task="sweep", run=shown(folder))
            said = visible(f"the report could not be written ({error}); again: {again}")
            sys.stderr.write(said + "\n")
        failed = sum(run.metrics is None for run in runs)
        if failed:
            sys.exit(f"error: {failed} of the {len(runs)} jobs failed, see above")


def _refuse_links(sweep: Path) -> None:
    """End here if the folder of a sweep holds a link: Hydra and sweepers write through it."""
    for file in sweep.iterdir() if sweep.is_dir() else ():
        if file.is_symlink():
            sys.exit(
                f"error: {file} is a link, through which files elsewhere could be written over: "
                "remove it, or choose another folder with hydra.sweep.dir=..."
            )


def _varies(override: Override) -> bool:
    """Whether an override has several values (see `with_swept_groups` for those with one)."""
    if override.is_choice_sweep():
        return len(override.value().list) > 1
    return override.is_sweep_override()


def _check_job(cfg: DictConfig, number: int, overrides: list[str]) -> None:
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)  # for ${hydra:job.num}
        del cfg["hydra"]
    jobs(cfg, Path(), overrides, Path())
