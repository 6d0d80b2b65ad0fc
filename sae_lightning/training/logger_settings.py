"""Settings of the loggers beside TensorBoard, read without importing lightning."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from sae_lightning.errors import UserError

DEFAULT_PROJECT = "sae_lightning"
OFFLINE_MODES = ("offline", "dryrun", "disabled")  # values of WANDB_MODE


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    """Runs in Weights & Biases, one for each SAE."""

    use: bool = False
    """Log to Weights & Biases; `logger=wandb` sets it."""
    project: str | None = None
    """Project of the runs; null for `WANDB_PROJECT` or, without it, sae_lightning."""
    entity: str | None = None
    """User or team that owns the project; null for `WANDB_ENTITY` or your default."""
    tags: list[str] = field(default_factory=list)
    """Tags of the runs."""
    offline: bool = False
    """Write to the run folder only; `wandb sync` uploads it. `WANDB_MODE=offline` does the same."""

    def __post_init__(self):
        for name in ("project", "entity"):
            value = getattr(self, name)
            if value is not None and re.search(r"[/\\#?%:]|^\s*$", value):
                raise UserError(f"logger.wandb.{name}={value}: give a name without / \\ # ? % :")

    @property
    def is_online(self) -> bool:
        """Whether curves are sent to a server while training."""
        return self.use and not (self.offline or os.environ.get("WANDB_MODE") in OFFLINE_MODES)


@dataclass(slots=True, kw_only=True)
class CSVConfig:
    """A table of the curves in the run folder."""

    use: bool = False
    """Write `csv/metrics.csv`; `logger=csv` sets it."""


@dataclass(slots=True, kw_only=True)
class MLflowConfig:
    """MLflow, on a server or in a local database."""

    use: bool = False
    """Log to MLflow; `logger=mlflow` sets it."""
    experiment: str | None = None
    """Experiment of the runs; null for `MLFLOW_EXPERIMENT_NAME` or, without it, sae_lightning."""
    tracking_uri: str | None = None
    """Address of the server or database; null for `MLFLOW_TRACKING_URI` or, without it, the file
    mlflow.db in the working folder, as for `mlflow server`."""

    def __post_init__(self):
        if re.search(r"://[^@]*:[^@]*@|password=", self.tracking_uri or ""):
            raise UserError(
                "logger.mlflow.tracking_uri: holds a password, which config.yaml would keep; give "
                "the address as MLFLOW_TRACKING_URI in the environment instead"
            )


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Loggers beside TensorBoard, which is always on; the `logger` group. They change nothing about
    training, and may change when a run is resumed."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    csv: CSVConfig = field(default_factory=CSVConfig)
    """A table in the run folder."""
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)
    """MLflow, on a server or in a local database."""

    @property
    def used(self) -> list[str]:
        """Names of the loggers that are used."""
        return [name for name in ("wandb", "csv", "mlflow") if getattr(self, name).use]

    def resolve(self) -> "LoggerConfig":
        """Set null projects, experiments and addresses of used loggers from this environment,
        so that a run keeps them when it is resumed in another environment. `WANDB_ENTITY` is not
        copied, nor is `MLFLOW_TRACKING_URI`, because it may hold a password."""
        wandb, mlflow = self.wandb, self.mlflow
        if wandb.use:
            project = wandb.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
            wandb = replace(wandb, project=project)
        if mlflow.use:
            name = mlflow.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PROJECT
            uri = mlflow.tracking_uri
            if uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
                uri = make_default_tracking_uri()
            mlflow = replace(mlflow, experiment=name, tracking_uri=uri)
        return replace(self, wandb=wandb, mlflow=mlflow)


def make_default_tracking_uri() -> str:
    """MLflow's own default: a database in the working folder, with its absolute path."""
    return f"sqlite:///{Path.cwd() / 'mlflow.db'}"
