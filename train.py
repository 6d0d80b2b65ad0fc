"""Train a sparse autoencoder: python train.py model.features=10000 loss.l1=1e-3"""

import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sae_lightning.cli import explain, one_line_errors
from sae_lightning.config import Job, job, register
from sae_lightning.errors import UserError
from sae_lightning.objective import objective
from sae_lightning.terminal import phase

# Launchers whose jobs run in this process; those of others write to a log on some machine.
HERE = ("hydra._internal.", "hydra_plugins.one_pass_launcher.")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(cfg: DictConfig) -> float | None:
    """Run the job that the command line describes; returns what a searching sweeper maximises.

    None: it failed and said why, and the other jobs of the multirun go on.
    """
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode is RunMode.MULTIRUN
    folder, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    if multirun and not hydra_config.launcher._target_.startswith(HERE):
        try:
            return trained_elsewhere(job(cfg, folder, overrides))
        except Exception as error:  # it travels to the process that the user looks at
            line = explain(error, overrides)
            if line is None:
                traceback.print_exc()
                raise
            raise UserError(f"{folder.name}: {line}") from error
    with one_line_errors(folder, multirun):
        return trained(job(cfg, folder, overrides))
    return None


def trained(this: Job) -> float:
    """The objective of a job, after training it."""
    # imported late: a mistyped option is answered at once
    with phase("starting"):
        from sae_lightning.run import run

    return objective(run([this])[0], this.config.sweep)


def trained_elsewhere(this: Job) -> float:
    """The same in a process of its own; goes on where a cluster took the machine away."""
    with phase("starting"):
        from sae_lightning import folders, passes

    (metrics,) = passes.train([this])
    if metrics is None:
        raise UserError(folders.failure(this.folder)["reason"])
    return objective(metrics, this.config.sweep)


if __name__ == "__main__":
    register()
    with one_line_errors():
        train()
