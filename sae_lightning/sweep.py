"""What a multirun needs around its jobs; Hydra calls it (see conf/config.yaml)."""

import os
import sys
import traceback
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sae_lightning.analysis.sweep_report import write_report
from sae_lightning.cli import DEBUG, explain
from sae_lightning.config import is_sweep, jobs
from sae_lightning.folders import sweep_runs


class Sweep(Callback):
    """Around the jobs of a multirun: all are checked before the first, failures counted."""

    def __init__(self):
        self.failed = 0

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        """Name the jobs' folders after what is swept, and end here if any config is wrong."""
        loader = GlobalHydra.instance().config_loader()
        params = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
        given = params + OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        parsed = OverridesParser.create(loader).parse_overrides(given)
        same = [o.key_or_group for o in parsed if not o.is_sweep_override()]
        excluded = ",".join(f"'{key}'" for key in same)
        with read_write(config):  # each job is composed with these
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"
            )
        if not config.hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
            return  # another sweeper chooses as it goes
        for number, overrides in enumerate(BasicSweeper.split_arguments(parsed, None)[0]):
            try:
                _check_job(loader.load_sweep_config(config, overrides), number, overrides)
            except Exception as error:
                # Hydra turns a callback's exceptions into warnings, but not SystemExit
                message = explain(error, overrides)
                if message is None or os.environ.get(DEBUG):
                    traceback.print_exc()
                    sys.exit(1)
                sys.exit(f"error: {message}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_) -> None:
        """A job that failed, and said why, returns None."""
        self.failed += job_return._return_value is None

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        """Write the report; the failures' lines may be far up by now."""
        folder = Path(config.hydra.sweep.dir)
        if is_sweep(folder):
            write_report(folder, sweep_runs(folder))
        if self.failed:
            sys.exit(f"error: {self.failed} of the jobs failed, see above")


def _check_job(cfg: DictConfig, number: int, overrides: list[str]) -> None:
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)  # for ${hydra:job.num}
        del cfg["hydra"]
    jobs(cfg, Path(), overrides, Path())
