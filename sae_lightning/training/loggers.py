"""Lightning's loggers beside TensorBoard: one run for each head, curves plotted against tokens."""

import csv
import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sae_lightning.errors import WriteError
from sae_lightning.files import convert_write_errors, read_regular_file, refuse_link
from sae_lightning.training.logger_settings import LoggerConfig
from sae_lightning.training.logging import ExtraLogger, LoggedRun
from sae_lightning.training.remote_loggers import ANSWER_SECONDS, MLflowCurves, WandbCurves


class CSVCurves(ExtraLogger):
    """Writes `csv/metrics.csv` in the run folder: a line for each number of tokens (column `step`)
    at which there are points."""

    def __init__(self, run: LoggedRun):
        """A resumed run keeps the lines up to `run.resumed_at` tokens."""
        folder = run.folder / "csv"
        refuse_link(folder)
        # `row`: the points at `tokens`, which are not written yet
        self.path, self.row, self.tokens = folder / "metrics.csv", {}, 0
        kept = [] if run.resumed_at is None else _read_rows(self.path, run.resumed_at)
        with convert_write_errors(self.path):  # CSVLogger deletes an earlier table, or link
            self.logger = CSVLogger(
                run.folder, name="", version="csv", flush_logs_every_n_steps=sys.maxsize
            )
            for row in kept:
                tokens = int(row.pop("step"))
                self.logger.log_metrics(row, tokens)
            self.logger.save()

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        if tokens != self.tokens:
            self._end_row()
        self.row, self.tokens = self.row | values, tokens

    def flush(self) -> None:
        self._end_row()
        with convert_write_errors(self.path):
            self.logger.save()

    def finish(self, outcome: str) -> None:
        self.flush()

    def _end_row(self) -> None:
        """Give the points at `tokens`, if any, to Lightning's logger as one line."""
        if self.row:
            self.logger.log_metrics(self.row, self.tokens)
        self.row = {}


def _read_rows(path: Path, last: int) -> list[dict[str, Any]]:
    """The lines of an earlier table up to `last` tokens, without empty cells; none if there is no
    regular file at `path`."""
    if not path.is_file() or path.is_symlink():
        return []
    rows = [
        {name: value for name, value in row.items() if name and value}
        for row in csv.DictReader(io.StringIO(read_regular_file(path)))
    ]
    return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) <= last]


def open_loggers(config: LoggerConfig, run: LoggedRun, notes: set[str]) -> list[ExtraLogger]:
    """Open the loggers of a head's run. `notes`: what has failed or been printed, a set that the
    heads of a pass share; empty at first."""
    rank_zero_only.rank = 0  # Lightning's loggers would be silent on other ranks
    loggers: list[ExtraLogger] = [CSVCurves(run)] if config.csv.use else []
    if config.wandb.use:
        loggers.append(WandbCurves(run, config.wandb, notes))
    if config.mlflow.use:
        loggers.append(MLflowCurves(run, config.mlflow, notes))
    return loggers


def finish_loggers(outcomes: Sequence[tuple[ExtraLogger, str]]) -> None:
    """End the run of each logger with its outcome: `success`, `failed` or `stopped`."""
    for logger, outcome in outcomes:
        with suppress(WriteError):  # an earlier error has been reported
            logger.finish(outcome)
    seconds = ANSWER_SECONDS
    for logger, _ in outcomes:
        if not logger.await_end(seconds):
            seconds = 0  # so that only one logger waits that long
