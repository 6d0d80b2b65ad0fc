"""One TensorBoard run folder per head, its curves plotted against tokens."""

from collections.abc import Collection
from pathlib import Path

import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

HEADLINE = ("held_out/l0", "held_out/explained_variance", "train/dead")
"""What the HParams tab shows of each run, whatever it reads."""


class HeadLog:
    """Writes a head's curves into its run folder."""

    def __init__(
        self,
        folder: Path,
        settings: dict,
        columns: dict,
        swept: Collection[str],
        resumed_at: int | None,
        headline: Collection[str] = HEADLINE,
    ):
        """`settings` appear in the HParams tab, whose columns are the names in `columns`, those
        `swept` first, and the metrics `headline`; points after `resumed_at` tokens are replaced."""
        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        if not resumed_at:
            # TensorBoard takes the columns from any one run: each names those of all
            experiment, *_ = hparams(columns, dict.fromkeys(headline, 0.0))
            data = experiment.value[0].metadata.plugin_data
            content = HParamsPluginData.FromString(data.content)
            for info in content.experiment.hparam_infos:
                info.differs = info.name in swept  # the tab opens with five settings, these first
            data.content = content.SerializeToString()
            _, *session = hparams(settings, {})
            for summary in (experiment, *session):
                self.writer.file_writer.add_summary(summary)

    def scalars(self, values: dict[str, float], tokens: int) -> None:
        """Add one point to each named curve at `tokens` training tokens."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, tokens)

    def histogram(self, tag: str, values: Tensor, tokens: int) -> None:
        """Add the distribution of `values` at `tokens` training tokens."""
        values = values[values.isfinite()].float().cpu()
        if values.numel():
            self.writer.add_histogram(tag, values, tokens)

    def density(self, density: Tensor, tokens: int) -> None:
        """Add the histogram of log10 firing rates; features that never fired are not in it."""
        self.histogram("held_out/log10_density", torch.log10(density), tokens)

    def flush(self) -> None:
        """Put everything on disk."""
        self.writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self.writer.close()
