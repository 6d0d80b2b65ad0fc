"""Lightning's loggers for Weights & Biases and MLflow, which talk to a server.

Each logger of each head has its own thread: a slow server does not slow training down, and after an
error of a server only its logger stops, with one line.
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

ANSWER_SECONDS = 120  # longest wait for each answer of a server once training has ended
X_AXIS = "tokens"  # name of the x-axis in Weights & Biases
HISTOGRAM_BINS = 64


class RemoteLogger(ExtraLogger):
    """Sends a head's curves to Weights & Biases or MLflow from its own thread.

    After an error it prints one line and sends nothing more. `notes` is a set that the heads of a
    pass share. It holds the kinds of logger that could not be started, the servers that could not
    be reached, and the pages already printed.
    """

    kind: str
    start_lock = threading.Lock()  # one at a time: the first one creates the project or database

    def __init__(self, run: LoggedRun, config: Any, notes: set[str]):
        self.run, self.config, self.notes = run, config, notes
        self.id_path = run.folder / f"{self.kind}.json"
        self.queue: SimpleQueue = SimpleQueue()
        self.closed = False  # True after an error or the end: then nothing is sent
        self.sent = 0  # number of queued actions done so far
        self.logger: WandbLogger | MLFlowLogger | None = None  # None until `_start` has opened it
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        if not self.closed:
            self.queue.put((self._send, dict(values), tokens))

    def finish(self, outcome: str) -> None:
        self.queue.put((self._end, outcome))
        self.queue.put(None)  # ends the thread

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
            with self.start_lock:
                if self.kind in self.notes:  # another head could not start it
                    return
                try:
                    self._start()
                except Exception:
                    self.notes.add(self.kind)
                    raise
            while (item := self.queue.get()) is not None and not self.closed:
                action, *arguments = item
                action(*arguments)
                self.sent += 1
        except Exception as error:  # a server, network or library failed: training goes on
            self._report(str(error).strip() or repr(error))
        finally:
            self.closed = True

    def _report(self, reason: str) -> None:
        """Print why nothing more is sent, and what to do."""
        self.closed = True
        remedy = self._describe_remedy() if self.logger else ""
        self._print(f"{reason}; TensorBoard's curves of {self.run.name} are complete{remedy}")

    def _print(self, text: str) -> None:
        text = re.sub(r"//[^@\s]*@", "//", " ".join(text.split()))  # removes passwords
        sys.stderr.write(make_visible(f"logger={self.kind}: {text}") + "\n")

    def _describe_remedy(self) -> str:
        """The end of the line that `_report` prints; empty if nothing can be done."""
        return ""

    def _read_id(self) -> str | None:
        """Read the id that a resumed run had on the server; None if it is new or had none."""
        if self.run.resumed_at is None or not self.id_path.is_file():
            return None
        match = re.search(r'"run": "([\w-]{1,64})"', read_regular_file(self.id_path))
        return match and match[1]

    def _start(self) -> None:
        """Open the run on the server, and save its id."""
        raise NotImplementedError

    def _send(self, values: dict[str, float], tokens: int) -> None:
        """Send one point of each named curve."""
        raise NotImplementedError

    def _end(self, outcome: str) -> None:
        """End the run, once the server has all points."""
        raise NotImplementedError


class WandbCurves(RemoteLogger):
    """A run in Weights & Biases. Steps (tokens) can only grow there, so points that a resumed run
    measures again are not sent."""

    kind = "wandb"
    config: WandbConfig

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        if not self.closed:
            self.queue.put((self._send_histogram, tag, values, tokens))

    def _start(self) -> None:
        import wandb

        refuse_link(self.run.folder / "wandb")
        run_id = self._read_id() or secrets.token_hex(4)
        server = "Weights & Biases"
        try:
            wandb_run = self._make_run(run_id, self.config.offline or server in self.notes)
        except wandb.errors.CommError as error:
            self.notes.add(server)
            run_id = secrets.token_hex(4)  # the failed attempt keeps the first id in use
            wandb_run = self._make_run(run_id, offline=True)
            self._print(f"{error}; curves are kept on disk: {_format_upload(wandb_run)}")
        write_json(self.id_path, {"run": run_id})
        self.logger = WandbLogger(experiment=wandb_run)
        self.logger.log_hyperparams(self.run.settings)
        wandb_run.define_metric(X_AXIS)
        wandb_run.define_metric("*", step_metric=X_AXIS)
        if wandb_run.offline:
            return
        page = wandb_run.project_url if self.run.group else wandb_run.url  # one for a sweep
        if page and page not in self.notes:
            self.notes.add(page)
            console.print(f"Weights & Biases: {make_visible(page)}")

    def _make_run(self, run_id: str, offline: bool) -> Any:
        """A wandb run with this id, new or resumed."""
        import wandb

        run, config = self.run, self.config
        # WandbLogger's own call would return this process's first run instead of a second one
        return wandb.init(
            id=run_id,
            project=config.project,
            entity=config.entity,
            name=run.name,
            group=run.group,
            tags=config.tags,
            dir=run.folder,
            mode="offline" if offline else None,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",  # the terminal shows all heads
                symlink=False,
                # wandb then reports its own error before `await_end` gives up
                finish_timeout=ANSWER_SECONDS / 2,
                finish_timeout_raises=True,
            ),
        )

    def _send(self, values: dict[str, Any], tokens: int) -> None:
        if tokens >= self.logger.experiment.starting_step:
            self.logger.experiment.log(values | {X_AXIS: tokens}, step=tokens)

    def _send_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        """Send the distribution of `values` as one point of the curve `tag`."""
        import wandb

        self._send({tag: wandb.Histogram(values, num_bins=HISTOGRAM_BINS)}, tokens)

    def _end(self, outcome: str) -> None:
        self.logger.finalize(outcome)
        self.logger.experiment.finish(exit_code=int(outcome == "failed"))

    def _describe_remedy(self) -> str:
        return f"; to upload the rest: {_format_upload(self.logger.experiment)}"


def _format_upload(wandb_run: Any) -> str:
    """The command that uploads a run from disk."""
    return f"wandb sync {shlex.quote(str(Path(wandb_run.dir).parent))}"


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
        """Open the run at `uri`. If it is resumed, read where each of its curves ends."""
        run, earlier_id = self.run, self._read_id()
        self.last: dict[str, int] = {}  # tokens of each curve's last point
        self.logger = MLFlowLogger(
            experiment_name=self.config.experiment,
            run_name=run.name,
            tracking_uri=uri,
            tags={"sweep": run.group} if run.group else None,
            run_id=earlier_id,
        )
        client, run_id = self.logger.experiment, self.logger.run_id
        if earlier_id is None:
            self.logger.log_hyperparams(run.settings)
            write_json(self.id_path, {"run": run_id})
            return
        client.update_run(run_id, status="RUNNING")
        for tag in client.get_run(run_id).data.metrics:
            self.last[tag] = max(point.step for point in client.get_metric_history(run_id, tag))

    def _send(self, values: dict[str, float], tokens: int) -> None:
        # -1: a curve without a point yet takes one at 0 tokens, too
        new = {tag: value for tag, value in values.items() if tokens > self.last.get(tag, -1)}
        if new:
            self.logger.log_metrics(new, tokens)

    def _end(self, outcome: str) -> None:
        self.logger.finalize("KILLED" if outcome == "stopped" else outcome)
