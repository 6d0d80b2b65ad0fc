"""Lightning's loggers beside TensorBoard: one run for each head, curves plotted against tokens.

Weights & Biases and MLflow talk to a server. Each of their loggers has a thread of its own, so that
a slow server slows nothing down, and one that fails ends only this logger, with one line.
"""

import csv
import io
import logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from sae_lightning.errors import WriteError
from sae_lightning.files import convert_write_errors, read_regular_file, refuse_link, write_json
from sae_lightning.terminal import make_visible
from sae_lightning.training.logger_settings import LoggerConfig, MLflowConfig, WandbConfig

ANSWER_SECONDS = 120  # that a server gets for each answer once training has ended
X_AXIS = "tokens"  # name of the x-axis in Weights & Biases
HISTOGRAM_BINS = 64


class LoggedRun(NamedTuple):
    """What loggers say about the run of a head."""

    folder: Path
    name: str
    group: str | None
    """Name of the sweep that the run belongs to."""
    settings: dict[str, Any]
    """By dotted name."""
    resumed_at: int | None
    """Training tokens after which the run is resumed; None for a new run."""


class ExtraLogger:
    """Takes a head's curves beside its event file, with the same tags."""

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        """Add one point to each named curve at `tokens` training tokens."""
        raise NotImplementedError

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        """Add the distribution of the finite `values`, where the logger has histograms."""

    def flush(self) -> None:
        """Write buffered points to disk; what goes to a server is sent without being asked."""

    def finish(self, outcome: str) -> None:
        """End the run as a `success`, `failed` or `stopped`, once all points are written."""
        raise NotImplementedError

    def await_end(self, seconds: float) -> bool:
        """Wait until the run has ended; False if its server takes nothing for `seconds`."""
        return True


class CSVCurves(ExtraLogger):
    """Writes `csv/metrics.csv` in the run folder: a row for each point, `step` in tokens."""

    def __init__(self, run: LoggedRun):
        """A resumed run keeps the rows up to `run.resumed_at`."""
        folder = run.folder / "csv"
        refuse_link(folder)
        self.path, self.row, self.tokens = folder / "metrics.csv", {}, 0
        earlier = [] if run.resumed_at is None else _read_rows(self.path, run.resumed_at)
        with convert_write_errors(self.path):  # deletes the earlier table, or a link in its place
            self.logger = CSVLogger(
                run.folder, name="", version="csv", flush_logs_every_n_steps=sys.maxsize
            )
            for row in earlier:
                self.logger.log_metrics(row, int(row.pop("step")))
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
        if self.row:
            self.logger.log_metrics(self.row, self.tokens)
        self.row = {}


def _read_rows(path: Path, last: int) -> list[dict[str, Any]]:
    """The rows of an earlier table up to `last` tokens, without empty cells."""
    if not path.is_file() or path.is_symlink():
        return []
    rows = [
        {name: value for name, value in row.items() if name and value}
        for row in csv.DictReader(io.StringIO(read_regular_file(path)))
    ]
    return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) <= last]


class RemoteLogger(ExtraLogger, threading.Thread):
    """Sends a head's curves to Weights & Biases or MLflow from a thread of its own.

    After an error it says so in one line and sends nothing more. `down` holds the kinds of logger
    that could not be started in this pass, so that one line is enough for all heads.
    """

    kind: str
    starting = threading.Lock()  # projects and databases are made by the first run

    def __init__(self, about: LoggedRun, config: Any, down: set[str]):
        super().__init__(daemon=True, name=f"logger={self.kind}")
        self.about, self.config, self.down = about, config, down
        self.id_path = about.folder / f"{self.kind}.json"
        self.queue: SimpleQueue = SimpleQueue()
        self.failed, self.sent = False, 0
        self.logger: WandbLogger | MLFlowLogger | None = None

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        if not self.failed:
            self.queue.put((self._send, dict(values), tokens))

    def finish(self, outcome: str) -> None:
        self.queue.put((self._end, outcome))
        self.queue.put(None)

    def await_end(self, seconds: float) -> bool:
        while self.is_alive():
            before = self.sent
            self.join(seconds)
            if self.is_alive() and self.sent == before:
                self._report("its server does not answer")
                return False
        return True

    def run(self) -> None:
        """Start the run, then send what is queued until the end, or an error."""
        try:
            with self.starting:
                if self.kind in self.down:
                    return
                try:
                    self._start()
                except Exception:
                    self.down.add(self.kind)
                    raise
            while (item := self.queue.get()) is not None and not self.failed:
                action, *arguments = item
                action(*arguments)
                self.sent += 1
        except Exception as error:  # of a server, a network or a library: training goes on
            self._report(str(error).strip() or repr(error))
        finally:
            self.failed = True

    def _report(self, reason: str) -> None:
        self.failed = True
        remedy = self._describe_remedy() if self.logger else ""
        self._say(f"{reason}; TensorBoard's curves of {self.about.name} are complete{remedy}")

    def _say(self, text: str) -> None:
        text = re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))  # without passwords
        sys.stderr.write(make_visible(f"logger={self.kind}: {text}") + "\n")

    def _describe_remedy(self) -> str:
        return ""

    def _read_id(self) -> str | None:
        """The run's name on the server, from an earlier part of the run."""
        if self.about.resumed_at is None or not self.id_path.is_file():
            return None
        found = re.search(r'"run": "([\w-]{1,64})"', read_regular_file(self.id_path))
        return found and found[1]

    def _start(self) -> None:
        raise NotImplementedError

    def _send(self, values: dict[str, float], tokens: int) -> None:
        raise NotImplementedError

    def _end(self, outcome: str) -> None:
        raise NotImplementedError


class WandbCurves(RemoteLogger):
    """A run in Weights & Biases. Its steps are tokens, and only grow: of points that a resumed run
    measures again, the server keeps the first."""

    kind = "wandb"
    config: WandbConfig

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        if not self.failed:
            self.queue.put((self._send_histogram, tag, values, tokens))

    def _start(self) -> None:
        import wandb

        refuse_link(self.about.folder / "wandb")
        self.number = self._read_id() or secrets.token_hex(4)
        write_json(self.id_path, {"run": self.number})
        unreachable = "no connection to Weights & Biases"
        try:
            made = self._make_run(self.config.offline or unreachable in self.down)
        except wandb.errors.CommError as error:
            self._say(f"{error}; curves are kept in the run folder{self._describe_remedy()}")
            self.down.add(unreachable)
            made = self._make_run(offline=True)
        self.logger = WandbLogger(experiment=made)
        self.logger.log_hyperparams(self.about.settings)
        made.define_metric(X_AXIS)
        made.define_metric("*", step_metric=X_AXIS)

    def _make_run(self, offline: bool) -> Any:
        import wandb

        about, config = self.about, self.config
        # not WandbLogger's own call, which takes a second run in this process for the first
        return wandb.init(
            id=self.number,
            project=config.project,
            entity=config.entity,
            name=about.name,
            group=about.group,
            tags=config.tags,
            dir=about.folder,
            mode="offline" if offline else None,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",  # the terminal shows all heads
                symlink=False,
                finish_timeout=ANSWER_SECONDS / 2,
                finish_timeout_raises=True,
            ),
        )

    def _send(self, values: dict[str, Any], tokens: int) -> None:
        if tokens >= self.logger.experiment.starting_step:
            self.logger.experiment.log(values | {X_AXIS: tokens}, step=tokens)

    def _send_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        import wandb

        self._send({tag: wandb.Histogram(values, num_bins=HISTOGRAM_BINS)}, tokens)

    def _end(self, outcome: str) -> None:
        self.logger.finalize(outcome)
        self.logger.experiment.finish(exit_code=int(outcome == "failed"))

    def _describe_remedy(self) -> str:
        return f"; `wandb sync --include-offline` uploads {self.about.folder / 'wandb'}"


class MLflowCurves(RemoteLogger):
    """A run in MLflow. Points cannot be deleted there, so a resumed run adds only those after the
    last one of each curve."""

    kind = "mlflow"
    config: MLflowConfig

    def _start(self) -> None:
        uri = self.config.tracking_uri or os.environ["MLFLOW_TRACKING_URI"]
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if re.match(r"file:|[^:]*$", uri):  # else MLflow would refuse a folder
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        try:
            self._open(uri)
        except Exception:  # another process may just have made the database or experiment
            self._open(uri)

    def _open(self, uri: str) -> None:
        about, number = self.about, self._read_id()
        self.last: dict[str, int] = {}
        self.logger = MLFlowLogger(
            experiment_name=self.config.experiment,
            run_name=about.name,
            tracking_uri=uri,
            tags={"sweep": about.group} if about.group else None,
            run_id=number,
        )
        client, own = self.logger.experiment, self.logger.run_id
        if number is None:
            self.logger.log_hyperparams(about.settings)
            write_json(self.id_path, {"run": own})
            return
        client.update_run(own, status="RUNNING")
        for tag in client.get_run(own).data.metrics:
            self.last[tag] = max(point.step for point in client.get_metric_history(own, tag))

    def _send(self, values: dict[str, float], tokens: int) -> None:
        new = {tag: value for tag, value in values.items() if tokens > self.last.get(tag, -1)}
        if new:
            self.logger.log_metrics(new, tokens)

    def _end(self, outcome: str) -> None:
        self.logger.finalize("KILLED" if outcome == "stopped" else outcome)


def open_loggers(config: LoggerConfig, about: LoggedRun, down: set[str]) -> list[ExtraLogger]:
    """Open the loggers of a head. `down`: empty at first, and shared by the heads of a pass."""
    rank_zero_only.rank = 0  # Lightning's loggers would be silent on other ranks
    loggers: list[ExtraLogger] = []
    if config.csv.use:
        loggers.append(CSVCurves(about))
    for kind, own in ((WandbCurves, config.wandb), (MLflowCurves, config.mlflow)):
        if own.use:
            loggers.append(kind(about, own, down))
            loggers[-1].start()
    return loggers


def finish_loggers(outcomes: Sequence[tuple[ExtraLogger, str]]) -> None:
    """End the run of each logger with its outcome: `success`, `failed` or `stopped`."""
    for logger, outcome in outcomes:
        with suppress(WriteError):  # an earlier one has been reported
            logger.finish(outcome)
    patience = ANSWER_SECONDS
    for logger, _ in outcomes:
        if not logger.await_end(patience):
            patience = 0
