"""How well single units detect concepts, from counts that do not grow with the text.

    counts[half, concept, unit, bin]   number of the concept's tokens on which the unit's strength
                                       is in the bin; all tokens are counted as a last concept
    half 0: sequences of even index    -> choose the unit and the threshold with the best F1
    half 1: sequences of odd index     -> score them

Shapes: n = tokens, units = features or neurons, bins = bins of strengths.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.report.catalogue import EDGES

STRENGTHS_AT_ONCE = 1 << 20  # strengths sorted into bins at a time: bounds memory
CELLS_AT_ONCE = 1 << 22  # cells to collect before they are counted: bounds memory
SCORED_AT_ONCE = 16_384  # units scored at a time: bounds memory
MAX_QUANTILE_VALUES = 1 << 23  # torch.quantile refuses very large inputs
# Quantiles that separate the bins of neurons: finer at both ends, where rare concepts are. They go
# from the median, 1/2, to 2^-11 and to 1 - 2^-11, four to an octave.
_TAIL = 0.5 * 2.0 ** -torch.arange(0, 10.25, 0.25)
QUANTILE_LEVELS = torch.cat([_TAIL.flip(0), 1 - _TAIL[1:]])  # with the median only once


class Detector(NamedTuple):
    """A unit and a threshold that detect a concept."""

    unit: int
    below: bool
    """Whether it detects below the threshold instead of above (a neuron's negative direction)."""
    threshold: float
    chosen_f1: float
    """F1 on the half of the sequences on which unit and threshold were chosen."""
    f1: float
    """F1 on the other half, like all scores below."""
    precision: float
    recall: float
    auroc_unit: int
    """The unit with the best AUROC on the half used for choosing; it may differ from `unit`."""
    auroc: float
    """AUROC of `auroc_unit`: the probability that it is stronger (in a negative direction: weaker)
    on a token of the concept than on another token; 0.5 is chance."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as `theory.json` has them, where `auroc_unit` is called `ranker`."""
        names = {"auroc_unit": "ranker"}
        return {names.get(name, name): value for name, value in self._asdict().items()}


class StrengthCounts(NamedTuple):
    """Histogram of each unit's strengths on each concept's tokens, in two halves of the text
    (sequences of even index, of odd index).

    Of `counts[half, concept, unit, bin]` only the cells that are not 0 are stored.
    """

    cells: Tensor
    """[nonzero] flat indices into counts, ascending"""
    numbers: Tensor
    """[nonzero] counts in these cells, int32"""
    tokens: Tensor
    """[2, concepts + 1] number of tokens of each concept in each half; the last concept is all
    tokens"""
    thresholds: Tensor
    """[units, bins - 1] lower edge of each bin but the first"""
    signed: bool
    """Whether units can also detect by low values, as neurons can."""

    def read(self, half: int, concept: int) -> Tensor:
        """Counts [units, bins] int32 on the tokens of one concept in one half. Tokens on which a
        feature is silent are in no cell; they are added to bin 0."""
        units, bins = len(self.thresholds), self.thresholds.shape[1] + 1
        size = units * bins
        block = half * self.tokens.shape[1] + concept  # flat index of counts[half, concept]
        first, end = torch.searchsorted(self.cells, torch.tensor([block, block + 1]) * size)
        counts = torch.zeros(size, dtype=torch.int32)
        counts[self.cells[first:end] - block * size] = self.numbers[first:end]
        counts = counts.view(units, bins)
        counts[:, 0] += self.tokens[half, concept] - counts.sum(dim=1)
        return counts

    def score_thresholds(self, half: int, concept: int, units: Tensor) -> Iterator[list[Tensor]]:
        """Score the units with the indices `units`, part by part. Yields F1, precision and recall
        [sides, part, bins - 1] of detecting the concept by each threshold, and AUROC [sides, part]
        of ranking tokens by strength.

        Side 0 detects at or above the threshold. Signed units also have a side 1, which detects
        below the threshold and ranks by falling strength. Precision is 0 where nothing is detected.
        Recall and AUROC are NaN for a concept of no tokens, AUROC also for a concept of all tokens.
        """
        all_tokens = self.tokens.shape[1] - 1  # index of the last concept
        concept_parts = self.read(half, concept)[units].split(SCORED_AT_ONCE)
        all_parts = self.read(half, all_tokens)[units].split(SCORED_AT_ONCE)
        for concept_counts, all_counts in zip(concept_parts, all_parts, strict=True):
            yield _score_thresholds(concept_counts, all_counts, self.signed)


def _score_thresholds(concept_counts: Tensor, all_counts: Tensor, signed: bool) -> list[Tensor]:
    """F1, precision, recall and AUROC (see `score_thresholds`), from the counts [units, bins] on
    the concept's tokens and on all tokens."""
    concept_counts, all_counts = concept_counts.double(), all_counts.double()
    members, tokens = (counts.sum(dim=-1, keepdim=True) for counts in (concept_counts, all_counts))
    # counts at or above each threshold
    hits, predicted = (
        counts.flip(-1).cumsum(-1).flip(-1)[..., 1:] for counts in (concept_counts, all_counts)
    )
    others = all_counts - concept_counts
    weaker_others = others.cumsum(dim=-1) - others / 2  # ties (the same bin) count half
    wins = (concept_counts * weaker_others).sum(dim=-1)
    auroc = wins / (members * (tokens - members))[:, 0]
    if signed:
        hits = torch.stack([hits, members - hits])
        predicted = torch.stack([predicted, tokens - predicted])
        auroc = torch.stack([auroc, 1 - auroc])
    else:
        hits, predicted, auroc = hits[None], predicted[None], auroc[None]
    precision = torch.where(predicted > 0, hits / predicted, 0.0)
    return [2 * hits / (predicted + members), precision, hits / members, auroc]


class FeatureCounts:
    """Histograms of features' strengths, in bins of half an octave; bin 0 is for silent tokens."""

    def __init__(self, concepts: int, features: int, device: torch.device | str = "cpu"):
        self.features = features
        self.edges = EDGES.to(device)
        # the fields of `StrengthCounts`, over the tokens counted so far
        self.tokens = torch.zeros(2, concepts + 1, dtype=torch.int32, device=device)
        self.cells = torch.empty(0, dtype=torch.int64, device=device)
        self.numbers = torch.empty(0, dtype=torch.int32, device=device)
        self.uncounted: list[Tensor] = []  # flat indices to count, one for each token in a cell

    def add(self, strengths: Tensor, is_member: Tensor, half: Tensor, active: Tensor) -> None:
        """Add tokens: strengths [n, active] of the features with the indices `active` [active],
        whether each token belongs to each concept (bool [n, concepts]), and its half of the text
        (0 or 1, [n])."""
        _, block = _pair_with_concepts(is_member, half)
        _increment(self.tokens, block)
        active = active.to(strengths.device)
        tokens, columns = (i.split(STRENGTHS_AT_ONCE) for i in strengths.nonzero(as_tuple=True))
        for token, column in zip(tokens, columns, strict=True):
            # strengths below all edges go to bin 1: bin 0 is for silent tokens
            values = strengths[token, column]
            bin_index = torch.bucketize(values, self.edges, right=True).clamp(min=1)
            entry, block = _pair_with_concepts(is_member[token], half[token])
            # flat index into counts[half, concept, unit]
            histogram = block * self.features + active[column[entry]]
            self.uncounted.append(histogram * (len(self.edges) + 1) + bin_index[entry])
            # counting sorts all cells, so it waits until there are as many new ones as old ones
            if sum(map(len, self.uncounted)) > max(CELLS_AT_ONCE, len(self.cells)):
                self._count()

    def _count(self) -> None:
        """Add the uncounted cells to `cells` and `numbers`."""
        ones = [torch.ones_like(cells, dtype=torch.int32) for cells in self.uncounted]
        cells, numbers = torch.cat([self.cells, *self.uncounted]), torch.cat([self.numbers, *ones])
        self.uncounted.clear()
        self.cells, index = cells.unique(return_inverse=True)
        self.numbers = torch.zeros_like(self.cells, dtype=torch.int32).index_add_(0, index, numbers)

    def result(self) -> StrengthCounts:
        self._count()
        cells, numbers, tokens = self.cells.cpu(), self.numbers.cpu(), self.tokens.cpu()
        # bin 1 begins at 0, because `add` puts strengths below all edges into it
        thresholds = torch.cat([torch.zeros(1), EDGES[1:]]).expand(self.features, -1)
        return StrengthCounts(cells, numbers, tokens, thresholds, signed=False)


class NeuronCounts:
    """Histograms of neurons (dimensions of a site), binned by quantiles of the first batch."""

    def __init__(self, concepts: int):
        self.concepts = concepts
        self.edges = self.counts = None  # made from the first batch

    def add(self, x: Tensor, is_member: Tensor, half: Tensor) -> None:
        """Add tokens: activations [n, d]; the rest as in `FeatureCounts.add`."""
        if self.edges is None:
            sample = x[: max(1, MAX_QUANTILE_VALUES // x.shape[1])]
            self.edges = torch.quantile(sample, QUANTILE_LEVELS.to(x), dim=0).T.contiguous()
            shape = 2, self.concepts + 1, x.shape[1], len(QUANTILE_LEVELS) + 1
            self.counts = torch.zeros(shape, dtype=torch.int32, device=x.device)
        d, bins = self.counts.shape[2:]
        neurons, tokens_at_once = torch.arange(d, device=x.device), max(1, STRENGTHS_AT_ONCE // d)
        parts = (tensor.split(tokens_at_once) for tensor in (x, is_member, half))
        for part_x, part_member, part_half in zip(*parts, strict=True):
            bin_index = torch.searchsorted(self.edges, part_x.T.contiguous(), right=True).T
            token, block = _pair_with_concepts(part_member, part_half)
            histogram = block[:, None] * d + neurons  # flat index into counts[half, concept, unit]
            _increment(self.counts, histogram * bins + bin_index[token])

    def result(self) -> StrengthCounts:
        counts = self.counts.cpu()
        cells = counts.flatten().nonzero().squeeze(1)
        tokens = counts[:, :, 0].sum(dim=-1)  # from neuron 0: every token is in one of its bins
        return StrengthCounts(cells, counts.flatten()[cells], tokens, self.edges.cpu(), signed=True)


def _pair_with_concepts(is_member: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each token with each concept that it belongs to, and with the last concept, all tokens
    -> index of the token [pairs], flat index of counts[half, concept] [pairs]."""
    is_member = torch.cat([is_member, torch.ones_like(is_member[:, :1])], dim=1)
    token, concept = is_member.nonzero(as_tuple=True)
    return token, half[token] * is_member.shape[1] + concept


def _increment(counts: Tensor, indices: Tensor) -> None:
    """Add 1 at each index into the flattened counts; indices may repeat."""
    indices = indices.flatten()
    counts.view(-1).index_add_(0, indices, torch.ones_like(indices, dtype=torch.int32))


def find_detector(counts: StrengthCounts, concept: int, units: Tensor | None = None) -> Detector:
    """Choose unit and threshold by F1, and a unit by AUROC, on half 0; score them on half 1.
    units: indices of the units to choose from, all by default. In both halves, some tokens must
    belong to the concept and others not."""
    units = torch.arange(len(counts.thresholds)) if units is None else units
    parts = []
    for f1, _, _, auroc in counts.score_thresholds(0, concept, units):
        best_f1, best_threshold = f1.max(dim=-1)
        parts.append((best_f1, best_threshold, auroc))
    # best F1 of each unit, index of its threshold, and AUROC; all [sides, units]
    f1s, thresholds, aurocs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    side, column = divmod(int(f1s.argmax()), len(units))
    threshold = int(thresholds[side, column])
    auroc_side, auroc_column = divmod(int(aurocs.argmax()), len(units))
    # scored on half 1: the best unit by F1 (index 0) and the best by AUROC (index 1)
    best = units[[column, auroc_column]]
    f1, precision, recall, auroc = next(counts.score_thresholds(1, concept, best))
    return Detector(
        unit=int(best[0]),
        below=side == 1,
        threshold=counts.thresholds[best[0], threshold].item(),
        chosen_f1=f1s[side, column].item(),
        f1=f1[side, 0, threshold].item(),
        precision=precision[side, 0, threshold].item(),
        recall=recall[side, 0, threshold].item(),
        auroc_unit=int(best[1]),
        auroc=auroc[auroc_side, 1].item(),
    )
