"""Lightning's loggers for Weights & Biases and MLflow, which talk to a server.

Each logger of each head has a thread of its own, so that a slow server slows nothing down, and one
that fails ends only this logger, with one line.
"""

import os
import re
import secrets
import shlex
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor

from sae_lightning.files import read_regular_file, refuse_link, write_json
from sae_lightning.terminal import console, make_visible
from sae_lightning.training.logger_settings import MLflowConfig, WandbConfig
from sae_lightning.training.logging import ExtraLogger, LoggedRun

ANSWER_SECONDS = 120  # to wait for each answer of a server once training has ended
X_AXIS = "tokens"  # name of the x-axis in Weights & Biases
HISTOGRAM_BINS = 64


class RemoteLogger(ExtraLogger):
    """Sends a head's curves to Weights & Biases or MLflow from a thread of its own.

    After an error it says so in one line and sends nothing more. `known` is a set that the heads of
    a pass share: kinds of logger that could not be started, and what has been printed already.
    """

    kind: str
    starting = threading.Lock()  # one run at a time: the first one creates the project or database

    def __init__(self, about: LoggedRun, config: Any, known: set[str]):
        self.about, self.config, self.known = about, config, known
        self.id_path = about.folder / f"{self.kind}.json"
        self.queue: SimpleQueue = SimpleQueue()
        self.failed, self.sent = False, 0
        self.logger: WandbLogger | MLFlowLogger | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        if not self.failed:
            self.queue.put((self._send, dict(values), tokens))

    def finish(self, outcome: str) -> None:
        self.queue.put((self._end, outcome))
        self.queue.put(None)

    def await_end(self, seconds: float) -> bool:
        while self.thread.is_alive():
            before = self.sent
            self.thread.join(seconds)
            if self.thread.is_alive() and self.sent == before:
                self._report("its server does not answer")
                return False
        return True

    def _work(self) -> None:
        """Start the run, then send what is queued until the end, or an error."""
        try:
            with self.starting:
                if self.kind in self.known:
                    return
                try:
                    self._start()
                except Exception:
                    self.known.add(self.kind)
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
        text = re.sub(r"//[^@\s]*@", "//", " ".join(text.split()))  # without passwords
        sys.stderr.write(make_visible(f"logger={self.kind}: {text}") + "\n")

    def _describe_remedy(self) -> str:
        return ""

    def _read_id(self) -> str | None:
        """Read the id that a resumed run had on the server before; None for a new run."""
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
    """A run in Weights & Biases. Its steps are tokens and can only grow, so the server keeps the
    first of the points that a resumed run measures again."""

    kind = "wandb"
    config: WandbConfig

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        if not self.failed:
            self.queue.put((self._send_histogram, tag, values, tokens))

    def _start(self) -> None:
        import wandb

        refuse_link(self.about.folder / "wandb")
        number, unreachable = self._read_id() or secrets.token_hex(4), "Weights & Biases"
        try:
            made = self._make_run(number, self.config.offline or unreachable in self.known)
        except wandb.errors.CommError as error:
            self.known.add(unreachable)
            number = secrets.token_hex(4)  # the other one stays in use
            made = self._make_run(number, offline=True)
            self._say(f"{error}; curves are kept on disk: {_format_upload(made)}")
        write_json(self.id_path, {"run": number})
        self.logger = WandbLogger(experiment=made)
        self.logger.log_hyperparams(self.about.settings)
        made.define_metric(X_AXIS)
        made.define_metric("*", step_metric=X_AXIS)
        page = None if made.offline else made.project_url if self.about.group else made.url
        if page and page not in self.known:
            self.known.add(page)
            console.print(f"Weights & Biases: {make_visible(page)}")

    def _make_run(self, number: str, offline: bool) -> Any:
        import wandb

        about, config = self.about, self.config
        # not WandbLogger's own call, which takes a second run in this process for the first
        return wandb.init(
            id=number,
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
        return f"; to upload the rest: {_format_upload(self.logger.experiment)}"


def _format_upload(made: Any) -> str:
    return f"wandb sync {shlex.quote(str(Path(made.dir).parent))}"


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
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
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
