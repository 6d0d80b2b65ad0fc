"""What counts as a unit: a feature of the SAE, or a neuron of the site that it reads."""

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from sae_lightning.analysis.collect import EncodedBatch

Strengths = Callable[[EncodedBatch], tuple[Tensor, Tensor]]
"""Of a batch: strengths [sequences, context, some], not negative, 0 where not `keep`, and the
numbers [some] of these units, on the CPU; all others are silent."""


class Positive(Enum):
    """How a neuron's value, which has a sign, becomes a strength."""

    abs = "abs"
    """Its absolute value."""
    relu = "relu"
    """Its value where it is positive, else 0."""
    shift = "shift"
    """Its value minus the least that it takes on the first tokens, not below 0."""


def feature_strengths(batch: EncodedBatch) -> tuple[Tensor, Tensor]:
    """Strengths of the SAE's features."""
    return batch.active_features


class NeuronStrengths:
    """Strengths of the site's own dimensions, which have a sign, made positive."""

    def __init__(self, positive: Positive):
        self.positive = positive
        self._least: Tensor | None = None  # [d_in], on the first batch

    def __call__(self, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        if self.positive is Positive.abs:
            values = batch.x.abs()
        elif self.positive is Positive.relu:
            values = batch.x.relu()
        else:
            if self._least is None:
                self._least = batch.x[batch.keep].amin(dim=0)
            values = (batch.x - self._least).relu()
        units = torch.arange(values.shape[-1])
        return torch.where(batch.keep[..., None], values, 0), units
