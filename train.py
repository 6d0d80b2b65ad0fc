"""Train a sparse autoencoder: python train.py model.features=10000 loss.l1=1e-3"""

import atexit
import signal
import sys

from sae_lightning.errors import check_packages

if __name__ == "__main__":  # before the other imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C exits without a traceback
    check_packages()
    from sae_lightning.runs.threads import share_cores

    share_cores()

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sae_lightning.runs.cli import one_line_errors, read_arguments
from sae_lightning.runs.jobs import make_job, read_overrides, read_swept_settings, register_schemas
from sae_lightning.runs.launchers import find_place
from sae_lightning.runs.search import compute_objective
from sae_lightning.terminal import phase


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(cfg: DictConfig) -> float | None:
    """Train the job that the command line describes; returns the objective of a search.

    Returns None if the job failed and printed why, so that the other jobs of a multirun go on.
    (The launcher `one_pass` does not call this function: it trains all jobs together.)
    """
    if follow_first_rank():  # submitit calls this function on all ranks
        return None
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    multirun = hydra_config.mode is RunMode.MULTIRUN
    with one_line_errors(folder, multirun):
        job = make_job(cfg, folder, read_overrides(hydra_config), multirun)
        job.swept = read_swept_settings(hydra_config)
        # imported late, so that a mistyped option is reported at once
        with phase("starting"):
            from sae_lightning.runs.passes import train_jobs

        (metrics,) = train_jobs([job])
        return None if metrics is None else compute_objective(metrics, job.config.sweep)
    return None


def follow_first_rank() -> bool:
    """On ranks that a launcher has started, except on rank 0: train the passes that rank 0 sends,
    then return True. At its exit rank 0 ends the others, even if they have trained nothing."""
    place = find_place()
    if place is not None and place.rank > 0:
        from sae_lightning.runs.devices import follow

        follow()
        return True
    if place is not None:
        atexit.register(_release_followers)
    return False


def _release_followers() -> None:
    from sae_lightning.runs.devices import release_followers

    release_followers()


if __name__ == "__main__":
    register_schemas()
    if follow_first_rank():
        sys.exit()
    with one_line_errors():
        read_arguments()
        train()
