"""Train a sparse autoencoder: python train.py model.features=10000 loss.l1=1e-3"""

import signal

from sae_lightning.errors import check_packages

if __name__ == "__main__":  # before all else is imported, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    check_packages()
    from sae_lightning.runs.threads import share_cores

    share_cores()

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sae_lightning.runs.cli import one_line_errors, read_arguments
from sae_lightning.runs.jobs import job, overrides_of, register, swept_of
from sae_lightning.runs.search import objective
from sae_lightning.terminal import phase


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(cfg: DictConfig) -> float | None:
    """Run the job that the command line describes; returns what a searching sweeper maximises.

    None: it failed and said why, and the other jobs of the multirun go on. (The launcher
    `one_pass` does not come here: it trains all jobs together.)
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    multirun = hydra_config.mode is RunMode.MULTIRUN
    with one_line_errors(folder, multirun):
        this = job(cfg, folder, overrides_of(hydra_config), multirun)
        this.swept = swept_of(hydra_config)
        # imported late: a mistyped option is answered at once
        with phase("starting"):
            from sae_lightning.runs.passes import train as train_jobs

        (metrics,) = train_jobs([this])
        return None if metrics is None else objective(metrics, this.config.sweep)
    return None


if __name__ == "__main__":
    register()
    with one_line_errors():
        read_arguments()
        train()
