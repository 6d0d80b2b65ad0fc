"""A random sample of the text's sequences, of bounded size, with all units that fire in them."""

import heapq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.collect import EncodedBatch
from sae_lightning.analysis.survey.strengths import StrengthReader, read_feature_strengths

SAMPLE_TOKENS = 131_072  # limit on the tokens of a sample
SAMPLE_ENTRIES = 1 << 24  # limit on the nonzero strengths of a sample


class Sample(NamedTuple):
    """Sequences, and where units (features or neurons) fire in them: an entry is a unit that fires
    at a place; place = index of the sequence in the sample * context + position."""

    tokens: Tensor
    """[sequences, context] int32"""
    keep: Tensor
    """[sequences, context] bool: tokens that the SAE reads"""
    sequence_indices: Tensor
    """[sequences] index of each sequence in reading order, ascending"""
    starts: Tensor
    """[units + 1] index of each unit's first entry, then the number of entries"""
    places: Tensor
    """[entries] where the unit fires, ascending within each unit, int64"""
    strengths: Tensor
    """[entries] how strongly the unit fires there"""

    @property
    def unit_count(self) -> int:
        """Number of units, silent ones included."""
        return len(self.starts) - 1

    def densify(self, unit: int) -> Tensor:
        """Return a unit's strengths [sequences, context], float32; 0 where it is silent."""
        dense = torch.zeros(self.tokens.numel())
        entries = slice(int(self.starts[unit]), int(self.starts[unit + 1]))
        dense[self.places[entries]] = self.strengths[entries]
        return dense.view(self.tokens.shape)

    def list_entry_units(self) -> Tensor:
        """List the unit of each entry [entries], int64."""
        return torch.repeat_interleave(torch.arange(self.unit_count), self.starts.diff())


def rank_in_runs(values: np.ndarray) -> np.ndarray:
    """Position [n] of each value in its run of equal values, from 0; `values` [n] are >= 0."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return np.arange(len(values)) - np.repeat(starts, lengths)


class SequenceSampler:
    """A reducer: keeps a random sample of whole sequences. Each sequence gets a random key; when
    the sample exceeds a limit, the sequences with the smallest keys are dropped."""

    def __init__(
        self,
        units: int,
        seed: int,
        tokens: int = SAMPLE_TOKENS,
        entries: int = SAMPLE_ENTRIES,
        read_strengths: StrengthReader = read_feature_strengths,
    ):
        self.read_strengths = read_strengths
        self.units, self.limits = units, {"tokens": tokens, "entries": entries}
        self.random = np.random.default_rng(seed)
        self.kept: list[tuple] = []
        """A heap of (key, index of the sequence, tokens, keep, positions, units, strengths)."""
        self.size = {"tokens": 0, "entries": 0}  # of the kept sequences
        self.least_key = 0.0  # sequences with a smaller key cannot enter any more

    def add(self, batch: EncodedBatch) -> None:
        tokens, keep = batch.tokens.cpu().int().numpy(), batch.keep.cpu().numpy()
        values, units = self.read_strengths(batch)
        for i, key in enumerate(self.random.random(len(tokens))):
            if key < self.least_key:
                continue
            position, column = values[i].nonzero(as_tuple=True)
            value = values[i][position, column].cpu().numpy()
            position, unit = position.cpu().int().numpy(), units[column.cpu()].int().numpy()
            index = int(batch.sequence_indices[i])
            # copied, because a slice would keep the whole batch in memory
            item = (key, index, tokens[i].copy(), keep[i].copy(), position, unit, value)
            heapq.heappush(self.kept, item)
            self._count(item, 1)
            while self._is_full() and len(self.kept) > 1:  # one sequence is kept, however large
                dropped = heapq.heappop(self.kept)
                self.least_key = dropped[0]
                self._count(dropped, -1)

    def _count(self, item: tuple, sign: int) -> None:
        _, _, tokens, _, positions, *_ = item
        self.size["tokens"] += sign * tokens.size
        self.size["entries"] += sign * positions.size

    def _is_full(self) -> bool:
        return any(self.size[name] > limit for name, limit in self.limits.items())

    def result(self) -> Sample:
        kept = sorted(self.kept, key=lambda item: item[1])
        _, indices, tokens, keep, positions, units, values = zip(*kept, strict=True)
        sequences = np.repeat(np.arange(len(kept)), [len(position) for position in positions])
        context = tokens[0].size
        places = sequences * context + np.concatenate(positions)
        units, values = np.concatenate(units), np.concatenate(values)
        order = np.argsort(units, kind="stable")  # places stay ascending within a unit
        counts = np.bincount(units, minlength=self.units)
        return Sample(
            tokens=torch.from_numpy(np.stack(tokens)),
            keep=torch.from_numpy(np.stack(keep)),
            sequence_indices=torch.tensor(indices),
            starts=torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
            places=torch.from_numpy(places[order]),
            strengths=torch.from_numpy(values[order]),
        )
