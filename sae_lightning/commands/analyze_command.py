"""The command `analyze.py`, which is also installed as `sae-analyze`."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sae_lightning.analysis.tasks import TASKS
from sae_lightning.runs.arguments import refuse_sweep
from sae_lightning.runs.cli import refuse_second_task, report_errors, rewrite_command_line
from sae_lightning.runs.config import find_conf_folder, to_dataclass
from sae_lightning.runs.jobs import read_overrides
from sae_lightning.runs.plugins import load_plugins


def analyze_from_command_line() -> None:
    """Run the task that the command line names. UserError in all but the first process that a
    cluster job starts."""
    with report_errors():
        sys.argv[1:] = load_plugins(sys.argv[1:], TASKS)
        refuse_second_task()
        rewrite_command_line()
        refuse_sweep(sys.argv[1:])  # before Hydra makes a sweep's folders
        analyze_composed()


@hydra.main(version_base="1.3", config_path=find_conf_folder(), config_name="analyze")
def analyze_composed(cfg: DictConfig) -> None:
    """Run the task that a composed config describes."""
    with report_errors():
        overrides = read_overrides(HydraConfig.get())
        given_settings = [override.lstrip("+~").partition("=")[0] for override in overrides]
        if OmegaConf.is_missing(cfg.layer, "index"):
            cfg.layer.index = 0  # llm=hf does not set it; the run folder does
        to_dataclass(cfg).execute(given_settings)
