"""The command `train.py`, which is also installed as `sae-train`."""

import atexit
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sae_lightning.runs.cli import report_errors, rewrite_command_line
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.jobs import make_composed_job
from sae_lightning.runs.launchers import find_launched_rank
from sae_lightning.runs.plugins import import_plugins, load_plugins
from sae_lightning.runs.search import compute_objective
from sae_lightning.terminal import phase


def train_from_command_line() -> None:
    """Train the jobs of the command line or, on a rank other than 0, those that rank 0 sends."""
    with report_errors():
        sys.argv[1:] = load_plugins(sys.argv[1:])
        if follow_first_rank():
            sys.exit()
        rewrite_command_line()
        train_composed()


@hydra.main(version_base="1.3", config_path=find_conf_folder(), config_name="config")
def train_composed(cfg: DictConfig) -> float | None:
    """Train the job that a composed config describes; returns the value that a search maximises.

    Returns None if the job failed and printed why, so that the other jobs of a multirun go on.
    (Hydra's launcher `one_pass` does not call this function: it trains all jobs together.)
    """
    if follow_first_rank():  # submitit calls this function on all ranks
        return None
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    multirun = hydra_config.mode is RunMode.MULTIRUN
    with report_errors(folder, multirun):
        import_plugins(cfg.plugins)  # a process that submitit started has not done so
        job = make_composed_job(cfg)
        # imported late, so that a mistyped setting is reported at once
        with phase("starting"):
            from sae_lightning.analysis.benchmarks.benchmark_objective import train_and_score

        (metrics,) = train_and_score([job])  # train_jobs, then a benchmark if it is the objective
        return None if metrics is None else compute_objective(metrics, job.config.sweep)
    return None


def follow_first_rank() -> bool:
    """If torchrun, Slurm or submitit has started this process as a rank other than 0: train the
    passes that rank 0 sends, then return True. Otherwise return False; on rank 0, also have the
    other ranks end when this process exits."""
    launched = find_launched_rank()
    if launched is not None and launched.rank > 0:
        from sae_lightning.runs.devices import follow

        follow()
        return True
    if launched is not None:
        atexit.register(_release_followers)
    return False


def _release_followers() -> None:
    from sae_lightning.runs.devices import release_followers

    release_followers()
