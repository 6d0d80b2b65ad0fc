"""Reads strengths from a batch: of the SAE's features, or of the neurons of its source site."""

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from sae_lightning.analysis.collect import EncodedBatch

StrengthReader = Callable[[EncodedBatch], tuple[Tensor, Tensor]]
"""batch -> (strengths, units). strengths: [sequences, context, active], 0 where not `keep`; units:
[active] unit of each column, on the CPU. Units without a column are silent in the whole batch."""


class Positive(Enum):
    """How a neuron's signed value becomes a strength."""

    abs = "abs"
    """Its absolute value."""
    relu = "relu"
    """Its value where it is positive, else 0."""
    shift = "shift"
    """Its value minus its minimum on the first batch, at least 0."""


def read_feature_strengths(batch: EncodedBatch) -> tuple[Tensor, Tensor]:
    """Return the strengths of the SAE's active features, and their indices."""
    return batch.active_features


class NeuronStrengthReader:
    """Reads the strengths of neurons, the dimensions of the source site, made positive."""

    def __init__(self, positive: Positive):
        self.positive = positive
        self._minimum: Tensor | None = None  # [d_in] on the first batch

    def __call__(self, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        if self.positive is Positive.abs:
            values = batch.x.abs()
        elif self.positive is Positive.relu:
            values = batch.x.relu()
        else:
            if self._minimum is None:  # of the first batch, so that all batches are shifted equally
                self._minimum = batch.x[batch.keep].amin(dim=0)
            values = (batch.x - self._minimum).relu()
        units = torch.arange(values.shape[-1])
        return torch.where(batch.keep[..., None], values, 0), units
