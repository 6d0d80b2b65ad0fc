"""One TensorBoard run folder per head, its curves plotted against tokens."""

import os
import time
from collections.abc import Collection, Sequence
from itertools import accumulate, repeat, takewhile
from operator import mul
from pathlib import Path
from typing import NamedTuple

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, hparams, scalar

from sae_lightning.errors import WriteError
from sae_lightning.files import convert_write_errors

HEADLINE = ("held_out/l0", "held_out/explained_variance", "train/dead")
"""What the HParams tab shows of each run, whatever it reads."""

GLANCE = "At a glance"
"""The group of curves that TensorBoard shows first, since it sorts them as text, capitals before
small letters: the headline's held-out metrics, in its order, once more."""
EVENT_FORMAT = "brain.Event:2"
FLUSH_SECONDS = 120
# The bins of TensorBoard's own writer.
_positive = [*takewhile(lambda edge: edge < 1e20, accumulate(repeat(1.1), mul, initial=1e-12))]
BIN_EDGES = [*(-edge for edge in reversed(_positive)), 0, *_positive]


class EventFile:
    """A new event file of TensorBoard in `folder`.

    Unlike TensorBoard's own writer it has no thread, which would fail unseen, opens its file once
    and through no link, and notices where its folder has gone.
    """

    def __init__(self, folder: Path, purge: int | None):
        """Points of earlier files from step `purge` on are no longer shown."""
        seconds, micro = divmod(time.time_ns() // 1000, 1_000_000)
        self.folder, self.due = folder, time.monotonic() + FLUSH_SECONDS
        self.path = folder / f"events.out.tfevents.{seconds:010}.{micro:06}"
        with convert_write_errors(self.path):
            self.place = folder.stat()
            self.records = RecordWriter(open(self.path, "xb"))  # noqa: SIM115  open while we train
        self.write(Event(file_version=EVENT_FORMAT))
        if purge is not None:
            self.write(Event(file_version=EVENT_FORMAT, step=purge))
            self.write(Event(session_log=SessionLog(status=SessionLog.START), step=purge))
        self.flush()

    def write(self, event: Event) -> None:
        """Write an event of now."""
        event.wall_time = time.time()
        with convert_write_errors(self.path):
            self.records.write(event.SerializeToString())
        if time.monotonic() > self.due:
            self.flush()

    def flush(self) -> None:
        """Put everything on disk. WriteError: the folder is no longer where it was."""
        with convert_write_errors(self.path):
            self.records.flush()
        self.due = time.monotonic() + FLUSH_SECONDS
        if not (self.folder.is_dir() and os.path.samestat(self.folder.stat(), self.place)):
            raise WriteError(
                f"{self.folder} was deleted or renamed while its run was writing there; if it is "
                "elsewhere, continue with resume=... and its new name"
            )


class HParams(NamedTuple):
    """What the HParams tab is told of a run."""

    settings: dict
    """The run's own, by name."""
    columns: dict
    """Those of all runs that it is compared with."""
    swept: Collection[str] = ()
    """The settings that are shown first."""
    headline: Sequence[str] = HEADLINE
    """The metrics that are shown."""


class HeadLog:
    """Writes a head's curves into its run folder."""

    def __init__(self, folder: Path, told: HParams, resumed_at: int | None):
        """Points after `resumed_at` tokens are replaced."""
        held_out = [tag for tag in told.headline if tag.startswith("held_out/")]
        self.glance = {
            tag: f"{GLANCE}/{number} {tag.partition('/')[2]}"
            for number, tag in enumerate(held_out, 1)
        }
        self.events = EventFile(folder, None if resumed_at is None else resumed_at + 1)
        if not resumed_at:
            for summary in _summaries(told):
                self.events.write(Event(summary=summary))

    def add_scalars(self, values: dict[str, float], tokens: int) -> None:
        """Add one point to each named curve at `tokens` training tokens."""
        first = {self.glance[tag]: value for tag, value in values.items() if tag in self.glance}
        for tag, value in (first | values).items():
            self.events.write(Event(summary=scalar(tag, value), step=tokens))

    def add_histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        """Add the distribution of `values` at `tokens` training tokens."""
        values = values[values.isfinite()].float().cpu()
        if values.numel():
            drawn = histogram(tag, values, BIN_EDGES)
            self.events.write(Event(summary=drawn, step=tokens))

    def add_density(self, density: Tensor, tokens: int) -> None:
        """Add the histogram of log10 firing rates; features that never fired are not in it."""
        self.add_histogram("held_out/log10_density", torch.log10(density), tokens)

    def flush(self) -> None:
        """Put everything on disk."""
        self.events.flush()

    def close(self) -> None:
        """Finish the file."""
        with convert_write_errors(self.events.path):
            self.events.records.close()


def _summaries(told: HParams) -> list[Summary]:
    """For TensorBoard, which takes the columns from any one run: each names those of all."""
    experiment, *_ = hparams(told.columns, dict.fromkeys(told.headline, 0.0))
    data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in told.swept  # the tab opens with five settings, these first
    data.content = content.SerializeToString()
    _, *session = hparams(told.settings, {})
    return [experiment, *session]
