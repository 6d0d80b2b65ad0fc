"""Logs to TensorBoard: one run folder per head, curves plotted against tokens."""

import os
import time
from collections.abc import Collection, Sequence
from itertools import accumulate, repeat, takewhile
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, scalar
from torch.utils.tensorboard.summary import hparams as summarize_hparams

from sae_lightning.errors import WriteError
from sae_lightning.files import convert_write_errors

HEADLINE = ("held_out/l0", "held_out/explained_variance", "train/dead")
"""Metrics that TensorBoard's HParams tab shows for every run."""

GLANCE = "At a glance"
"""Name of a group of curves that repeats the headline's held-out metrics, in the same order.
TensorBoard shows this group first, because it sorts names with capitals before lower case."""
EVENT_FORMAT = "brain.Event:2"
FLUSH_SECONDS = 120
# The histogram bins of TensorBoard's own writer: 1e-12 * 1.1^i below 1e20, their negatives, and 0.
_edges_above_0 = [*takewhile(lambda edge: edge < 1e20, accumulate(repeat(1.1), mul, initial=1e-12))]
BIN_EDGES = [*(-edge for edge in reversed(_edges_above_0)), 0, *_edges_above_0]


class EventFile:
    """A new TensorBoard event file in `folder`.

    Unlike TensorBoard's own writer, it has no background thread, where errors would go unseen; it
    opens its file once, follows no symlink, and notices when its folder is deleted or renamed.
    """

    def __init__(self, folder: Path, purge: int | None):
        """TensorBoard hides the points of earlier files from step `purge` on; None hides none."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        self.folder, self.flush_at = folder, time.monotonic() + FLUSH_SECONDS
        self.path = folder / f"events.out.tfevents.{seconds:010}.{microseconds:06}"
        with convert_write_errors(self.path):
            self.folder_stat = folder.stat()
            self.records = RecordWriter(open(self.path, "xb"))  # noqa: SIM115  open while we train
        self.write(Event(file_version=EVENT_FORMAT))
        if purge is not None:
            self.write(Event(file_version=EVENT_FORMAT, step=purge))
            self.write(Event(session_log=SessionLog(status=SessionLog.START), step=purge))
        self.flush()

    def write(self, event: Event) -> None:
        """Write an event with the current time."""
        event.wall_time = time.time()
        with convert_write_errors(self.path):
            self.records.write(event.SerializeToString())
        if time.monotonic() > self.flush_at:
            self.flush()

    def flush(self) -> None:
        """Write buffered events to disk; WriteError if the folder was deleted or renamed."""
        with convert_write_errors(self.path):
            self.records.flush()
        self.flush_at = time.monotonic() + FLUSH_SECONDS
        if not (self.folder.is_dir() and os.path.samestat(self.folder.stat(), self.folder_stat)):
            raise WriteError(
                f"{self.folder} was deleted or renamed while its run was writing there; if it is "
                "elsewhere, continue with resume=... and its new name"
            )


class HParams(NamedTuple):
    """Content of the HParams tab for one run."""

    settings: dict
    """Settings of the run, by name."""
    columns: dict
    """Settings of any run of the command, each with an example value."""
    swept: Collection[str] = ()
    """Names of the settings that are shown first."""
    headline: Sequence[str] = HEADLINE
    """Names of the metrics that are shown."""


class LoggedRun(NamedTuple):
    """The run of a head, as loggers describe it."""

    folder: Path
    name: str
    group: str | None
    """Name of the sweep that the run belongs to; None for a plain run."""
    settings: dict[str, Any]
    """By dotted name."""
    resumed_at: int | None
    """Training tokens at the checkpoint that is resumed; None for a new run."""


class ExtraLogger:
    """A logger beside TensorBoard: gets a head's curves under the same tags."""

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        """Add one point to each named curve at `tokens` training tokens."""
        raise NotImplementedError

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        """Add the distribution of the finite `values`, where the logger has histograms."""

    def flush(self) -> None:
        """Write buffered points to disk; those for a server are sent without this."""

    def finish(self, outcome: str) -> None:
        """Write all points, then end the run; `outcome`: success, failed or stopped."""
        raise NotImplementedError

    def await_end(self, seconds: float) -> bool:
        """Wait until the run has ended; False if its server accepts nothing for `seconds`."""
        return True


class HeadLog:
    """Writes a head's curves to its run folder for TensorBoard, and to other loggers if used."""

    extra_loggers: Sequence[ExtraLogger] = ()

    def __init__(self, folder: Path, hparams: HParams, resumed_at: int | None):
        """`resumed_at`: the tokens after which a resumed run replaces earlier points; None for a
        new run."""
        held_out = [tag for tag in hparams.headline if tag.startswith("held_out/")]
        self.glance_tags = {
            name: f"{GLANCE}/{number} {name.partition('/')[2]}"
            for number, name in enumerate(held_out, 1)
        }
        # + 1: the points at the checkpoint itself stay
        self.events = EventFile(folder, None if resumed_at is None else resumed_at + 1)
        if not resumed_at:  # a resumed run has written them before
            for summary in _make_summaries(hparams):
                self.events.write(Event(summary=summary))

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        """Add one point to each named curve at `tokens` training tokens."""
        glance = {tag: values[name] for name, tag in self.glance_tags.items() if name in values}
        for tag, value in (glance | values).items():
            self.events.write(Event(summary=scalar(tag, value), step=tokens))
        for logger in self.extra_loggers:
            logger.add_scalars(values, tokens)

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        """Add the distribution of `values` at `tokens` training tokens."""
        values = values[values.isfinite()].float().cpu()
        if values.numel():
            summary = histogram(tag, values, BIN_EDGES)
            self.events.write(Event(summary=summary, step=tokens))
            for logger in self.extra_loggers:
                logger.add_histogram(tag, values, tokens)

    def add_density(self, density: Tensor, tokens: int) -> None:
        """Add the histogram of log10 firing rates; features that never fired are left out."""
        self.add_histogram("held_out/log10_density", torch.log10(density), tokens)

    def flush(self) -> None:
        """Write buffered points to disk."""
        self.events.flush()
        for logger in self.extra_loggers:
            logger.flush()

    def close(self) -> None:
        """Close the event file; it cannot be written to afterwards."""
        with convert_write_errors(self.events.path):
            self.events.records.close()


class SilentLog(HeadLog):
    """The log of a head whose curves another rank writes."""

    def __init__(self, *_) -> None:
        pass

    def add_scalars(self, *_) -> None:
        """Write nothing: another rank does."""

    add_histogram = add_density = flush = close = add_scalars


def _make_summaries(hparams: HParams) -> list[Summary]:
    """Summaries that fill the HParams tab. TensorBoard takes the columns from a single run, which
    may be any, so each run lists the columns of all."""
    columns, *_ = summarize_hparams(hparams.columns, dict.fromkeys(hparams.headline, 0.0))
    data = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in hparams.swept  # columns that differ are shown first
    data.content = content.SerializeToString()
    _, *values = summarize_hparams(hparams.settings, {})
    return [columns, *values]
