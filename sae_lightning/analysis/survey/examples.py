"""Reducers: how often units fire, their strongest examples, and the tokens of the text."""

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.collect import EncodedBatch
from sae_lightning.analysis.survey.strengths import StrengthReader
from sae_lightning.report.catalogue import AFTER, BEFORE, EDGES, WINDOW, Examples, Statistics

STRENGTH_BINS = len(EDGES) - 1
FLOAT16_MAX = torch.finfo(torch.float16).max


def make_empty_examples(units: int, n: int) -> Examples:
    """Make n empty slots for examples of each unit; a peak strength of 0 marks an empty slot."""
    return Examples(
        peak_strength=torch.zeros(units, n),
        tokens=torch.full((units, n, WINDOW), -1, dtype=torch.int32),
        strengths=torch.zeros(units, n, WINDOW, dtype=torch.float16),
        sequence=torch.zeros(units, n, dtype=torch.int64),
        position=torch.zeros(units, n, dtype=torch.int32),
    )


class FiringStatistics:
    """A reducer: how often and how strongly each unit fires."""

    def __init__(self, units: int, read_strengths: StrengthReader):
        self.read_strengths = read_strengths
        self.tokens = 0
        self.firing_counts = torch.zeros(units, dtype=torch.int64)
        self.sum = torch.zeros(units, dtype=torch.float64)
        self.maximum = torch.zeros(units)
        self.histogram = torch.zeros(units * STRENGTH_BINS, dtype=torch.int64)

    def add(self, batch: EncodedBatch) -> None:
        values, units = self.read_strengths(batch)
        values = values.flatten(0, 1)  # [tokens, active units]
        self.tokens += int(batch.keep.sum())
        if not len(units):
            return
        self.firing_counts[units] += (values > 0).sum(dim=0).cpu()
        self.sum[units] += values.sum(dim=0).cpu().double()
        self.maximum[units] = self.maximum[units].maximum(values.amax(dim=0).cpu())
        token, column = values.nonzero(as_tuple=True)
        lowest = EDGES[0].log2().item()
        bins = ((values[token, column].log2() - lowest) * 2).floor().long()  # half an octave wide
        # indices into the flat histogram
        cells = units[column.cpu()] * STRENGTH_BINS + bins.clamp(0, STRENGTH_BINS - 1).cpu()
        self.histogram.index_add_(0, cells, torch.ones_like(cells))

    def result(self) -> Statistics:
        mean = (self.sum / self.firing_counts.clamp(min=1)).float()
        histogram = self.histogram.view(-1, STRENGTH_BINS)
        return Statistics(self.tokens, self.firing_counts, mean, self.maximum, histogram)


class StrongestExamples:
    """A reducer: the strongest examples of each unit, at most one per sequence.

    kept [units, n]           9 7 4 2     The n strongest of both stay, here 9 8 7 4. The new 8
    new  [units, sequences]   1 8 3       takes the slot of the 2, which is dropped.
    """

    def __init__(self, units: int, n: int, read_strengths: StrengthReader):
        self.read_strengths, self.top = read_strengths, make_empty_examples(units, n)

    def add(self, batch: EncodedBatch) -> None:
        values, units = self.read_strengths(batch)  # [sequences, context, active units]
        best, position = (x.cpu() for x in values.max(dim=1))  # [sequences, active units]
        best = torch.where(best > 0, best, -1).T  # silent: -1, less than the 0 of an empty slot
        n = self.top.peak_strength.shape[1]
        winners = torch.cat([self.top.peak_strength[units], best], dim=1).topk(n, dim=1).indices
        stays = torch.zeros(len(best), n + best.shape[1], dtype=torch.bool)
        stays.scatter_(1, winners, True)
        # Each unit frees as many slots as it gets examples, and `nonzero` lists unit after unit. So
        # the i-th freed slot and the i-th new example are of the same unit.
        column, slot = (~stays[:, :n]).nonzero(as_tuple=True)
        _, sequence = stays[:, n:].nonzero(as_tuple=True)
        if len(column):
            peaks = position[sequence, column]
            examples = self._cut_windows(batch, values, column, sequence, peaks)
            for kept, new in zip(self.top, examples, strict=True):  # field by field
                kept[units[column], slot] = new

    def _cut_windows(
        self, batch: EncodedBatch, values: Tensor, column: Tensor, sequence: Tensor, peak: Tensor
    ) -> Examples:
        """Cut m windows around position `peak` [m] of `sequence` [m], with strengths from column
        `column` [m] of `values` [sequences, context, active units]."""
        window = peak[:, None] + torch.arange(-BEFORE, AFTER + 1)  # [m, WINDOW]
        inside = (window >= 0) & (window < values.shape[1])
        window = window.clamp(0, values.shape[1] - 1)
        tokens = batch.tokens.cpu()[sequence[:, None], window]
        around = values[sequence[:, None], window, column[:, None]].cpu()
        return Examples(
            peak_strength=around[:, BEFORE],
            tokens=torch.where(inside, tokens, -1).int(),
            # + 0 turns -0, which some SAEs give for silent features, into 0
            strengths=torch.where(inside, around, 0).clamp(0, FLOAT16_MAX).half() + 0,
            sequence=batch.sequence_indices[sequence],
            position=peak.int(),
        )

    def result(self) -> Examples:
        order = self.top.peak_strength.argsort(dim=1, descending=True, stable=True)
        units = torch.arange(len(order))[:, None]
        return Examples(*(field[units, order] for field in self.top))


class TokenRecorder:
    """A reducer: all tokens read, at 4 bytes each."""

    def __init__(self):
        self.batches: list[Tensor] = []

    def add(self, batch: EncodedBatch) -> None:
        self.batches.append(batch.tokens.cpu().int())

    def result(self) -> np.ndarray:
        """Ids [sequences, context] of all tokens, int32."""
        return torch.cat(self.batches).numpy()
