"""The command `analyze.py`, which is also installed as `sae-analyze`."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sae_lightning.analysis.tasks import TASKS
from sae_lightning.runs.arguments import refuse_sweep
from sae_lightning.runs.cli import refuse_other_ranks, report_errors, rewrite_command_line
from sae_lightning.runs.config import find_conf_folder, to_dataclass
from sae_lightning.runs.jobs import read_overrides
from sae_lightning.runs.plugins import load_plugins


def analyze_from_command_line() -> None:
    """Run the task of analyze.py that the command line names. If a cluster job has started several
    processes, all but the first end with an error."""
    with report_errors():
        sys.argv[1:] = load_plugins(sys.argv[1:], TASKS)
        refuse_other_ranks()
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
            # llm=hf has no default index, and `to_dataclass` refuses a missing one. 0 is used only
            # with `layer=...`; otherwise, the task takes the layer that the SAE was trained on.
            cfg.layer.index = 0
        to_dataclass(cfg).execute(given_settings)
