"""Look at what an SAE has learnt: python analyze.py run=outputs/<day>/<time>"""

import signal
import sys

from sae_lightning.errors import check_packages

if __name__ == "__main__":  # as in train.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    check_packages()
    from sae_lightning.runs.threads import share_cores

    share_cores()

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sae_lightning.analysis.tasks import TASKS
from sae_lightning.runs.arguments import refuse_sweep
from sae_lightning.runs.cli import one_line_errors, read_arguments, refuse_second_task
from sae_lightning.runs.config import to_dataclass
from sae_lightning.runs.jobs import read_overrides, register_schemas


@hydra.main(version_base="1.3", config_path="conf", config_name="analyze")
def analyze(cfg: DictConfig) -> None:
    """Run one task on one run folder or saved SAE."""
    with one_line_errors():
        typed = [o.lstrip("+~").partition("=")[0] for o in read_overrides(HydraConfig.get())]
        if OmegaConf.is_missing(cfg.layer, "index"):
            cfg.layer.index = 0  # llm=hf does not set it; the run folder does
        to_dataclass(cfg).execute(typed)


if __name__ == "__main__":
    register_schemas(TASKS)
    with one_line_errors():
        refuse_second_task()
        read_arguments()
        refuse_sweep(sys.argv[1:])  # before Hydra makes a sweep's folders
        analyze()
