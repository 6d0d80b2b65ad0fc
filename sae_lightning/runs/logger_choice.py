"""Chooses and checks the loggers of a run, from the command line and the run's folder."""

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.training.logger_settings import LoggerConfig, make_default_tracking_uri

# Settings that say where curves are sent. A run folder that has them may come from a stranger.
DESTINATIONS = (("wandb", "entity"), ("mlflow", "tracking_uri"))


def refuse_unused_options(config: LoggerConfig, overrides: Sequence[str]) -> None:
    """UserError if the options of a logger that is not used are typed and are not its defaults."""
    for override in overrides:
        if option := re.match(r"\+*logger\.(\w+)\.", override):
            logger = getattr(config, option[1])
            if not logger.use and logger != type(logger)():
                raise UserError(f"{override}: has no effect without logger={option[1]}; add it")


def resolve_loggers(config: LoggerConfig, overrides: Sequence[str]) -> LoggerConfig:
    """The loggers of a run, with null replaced by its value in this environment. UserError for a
    typed option without effect, or a logger that cannot be used."""
    refuse_unused_options(config, overrides)
    resolved = config.resolve()
    check_loggers(resolved)
    return resolved


def change_loggers(
    saved: LoggerConfig, composed: LoggerConfig, overrides: Sequence[str], folder: Path
) -> LoggerConfig:
    """The loggers of a resumed run: those `saved` in its `folder`, in which settings that were
    typed (`overrides`) are replaced by those of the `composed` config.

    UserError if the folder says where curves are sent and the command line does not: the folder
    may be a stranger's.
    """
    names = [override.lstrip("+").partition("=")[0] for override in overrides]
    loggers = saved
    for kind in ("wandb", "csv", "mlflow"):
        options = [name.split(".")[2] for name in names if name.startswith(f"logger.{kind}.")]
        options += ["use"] if "logger" in names else []  # `logger=wandb` sets it
        composed_logger = getattr(composed, kind)
        values = {option: getattr(composed_logger, option) for option in options}
        loggers = replace(loggers, **{kind: replace(getattr(loggers, kind), **values)})
    for name, value in list_destinations(loggers).items():
        if name not in names:
            raise UserError(
                f"{folder}: {name}={value} says where curves are sent; allow it by adding it to "
                f"this command, or add logger=none"
            )
    return resolve_loggers(loggers, overrides)


def list_destinations(config: LoggerConfig) -> dict[str, Any]:
    """The settings that say where curves are sent and that resuming must repeat, by name."""
    values = {
        f"logger.{kind}.{name}": getattr(getattr(config, kind), name)
        for kind, name in DESTINATIONS
        if kind in config.used
    }
    if not config.wandb.is_online:
        values.pop("logger.wandb.entity", None)
    return {k: v for k, v in values.items() if v not in (None, make_default_tracking_uri())}


def check_loggers(config: LoggerConfig) -> None:
    """UserError if a logger's package or login is missing."""
    uri = config.mlflow.tracking_uri or ""
    databases = ["sqlalchemy", "alembic"] if re.match("sqlite|mysql|postgres|mssql", uri) else []
    packages = {"wandb": ["wandb"], "mlflow": ["mlflow", *databases], "csv": []}
    for kind in config.used:
        for package in packages[kind]:
            if find_spec(package) is None:
                raise UserError(
                    f"logger={kind}: the package {package} is not installed; "
                    f'pip install -c constraints.txt -e ".[{kind}]"'
                )
    if config.wandb.is_online:
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "logger=wandb: no login found; run `wandb login`, set WANDB_API_KEY, or add "
                "logger.wandb.offline=true"
            )
