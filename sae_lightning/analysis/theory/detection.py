"""How well single units detect concepts, from counts that do not grow with the text.

    counts[half, concept, unit, bin]     tokens of the concept on which the unit's strength is
                                         in the bin (the last concept: all tokens)
    first half of the sequences          -> the unit and the threshold with the best F1
    second half                          -> their scores

Shapes: n = tokens, units = features or neurons.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.report.catalogue import EDGES

STRENGTHS_AT_ONCE = 1 << 20  # strengths sorted into bins at a time: bounds memory
MAX_QUANTILE_VALUES = 1 << 23  # torch.quantile refuses very large inputs
# Quantiles that separate the bins of neurons: finer at both ends, where rare concepts are.
_TAIL = 0.5 * 2.0 ** -torch.arange(0, 10.25, 0.25)
QUANTILE_LEVELS = torch.cat([_TAIL.flip(0), 1 - _TAIL[1:]])


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
    ranker: int
    """The unit with the best AUROC on the half used for choosing; it may be another than `unit`."""
    auroc: float
    """AUROC of `ranker`: the probability that it ranks a token of the concept above another token;
    0.5 is chance."""


class StrengthCounts(NamedTuple):
    """Histogram of each unit's strengths on each concept's tokens, in two halves of the text."""

    counts: Tensor
    """[2, concepts + 1, units, bins] int32; the last concept is all tokens"""
    thresholds: Tensor
    """[units, bins - 1] lower edge of each bin but the first"""
    signed: bool
    """Whether units also have a negative direction."""

    @property
    def token_counts(self) -> Tensor:
        """[2, concepts + 1] tokens of each concept in each half."""
        return self.counts[:, :, 0].sum(dim=-1)

    def score_thresholds(self, half: int, concept: int, units: Tensor) -> tuple[Tensor, ...]:
        """F1, precision and recall [sides, units, bins - 1] of predicting the concept from each
        threshold up, and AUROC [sides, units]; signed units have a second side, below it.
        """
        inside, everything = (self.counts[half, c, units].double() for c in (concept, -1))
        members, tokens = (counts.sum(dim=-1, keepdim=True) for counts in (inside, everything))
        # counts at or above each threshold
        hits, predicted = (
            counts.flip(-1).cumsum(-1).flip(-1)[..., 1:] for counts in (inside, everything)
        )
        others = everything - inside
        below = others.cumsum(dim=-1) - others / 2  # ties (the same bin) count half
        auroc = (inside * below).sum(dim=-1) / (members * (tokens - members))[:, 0]
        if self.signed:
            hits = torch.stack([hits, members - hits])
            predicted = torch.stack([predicted, tokens - predicted])
            auroc = torch.stack([auroc, 1 - auroc])
        else:
            hits, predicted, auroc = hits[None], predicted[None], auroc[None]
        precision = torch.where(predicted > 0, hits / predicted, 0.0)
        return 2 * hits / (predicted + members), precision, hits / members, auroc


class FeatureCounts:
    """Histograms of features' strengths, in bins of half an octave; bin 0 counts silent tokens."""

    def __init__(self, concepts: int, features: int, device: torch.device | str = "cpu"):
        self.edges = EDGES.to(device)
        self.tokens = torch.zeros(2, concepts + 1, dtype=torch.int32, device=device)
        shape = 2, concepts + 1, features, len(EDGES) + 1
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)

    def add(self, strengths: Tensor, member: Tensor, half: Tensor, units: Tensor) -> None:
        """Add tokens: strengths [n, active] of the features `units` [active], the concepts of each
        token (bool [n, concepts]), and its half of the text (0 or 1, [n])."""
        _increment(self.tokens, _pair_with_concepts(member, half)[1])
        units = units.to(strengths.device)
        features, bins = self.counts.shape[2:]
        fires = strengths.nonzero(as_tuple=True)
        for tokens, columns in zip(*(i.split(STRENGTHS_AT_ONCE) for i in fires), strict=True):
            # strengths below all edges go to bin 1: bin 0 is for silent tokens
            level = torch.bucketize(strengths[tokens, columns], self.edges, right=True).clamp(min=1)
            entry, group = _pair_with_concepts(member[tokens], half[tokens])
            unit = units[columns[entry]]
            _increment(self.counts, (group * features + unit) * bins + level[entry])

    def result(self) -> StrengthCounts:
        """The counts of all tokens added so far, on the CPU."""
        counts = self.counts.cpu()
        # summed in int32: for a sum in int64, torch would first make an int64 copy of all counts
        fired = counts[..., 1:].sum(dim=-1, dtype=torch.int32)
        counts[..., 0] = self.tokens.cpu()[..., None] - fired
        thresholds = torch.cat([torch.zeros(1), EDGES[1:]]).expand(counts.shape[2], -1)
        return StrengthCounts(counts, thresholds, signed=False)


class NeuronCounts:
    """Histograms of neurons (dimensions of a site), binned by quantiles of the first batch."""

    def __init__(self, concepts: int):
        self.concepts = concepts
        self.edges = self.counts = None

    def add(self, x: Tensor, member: Tensor, half: Tensor) -> None:
        """Add tokens: activations [n, d], concepts (bool [n, concepts]), halves (0 or 1, [n])."""
        if self.edges is None:
            first = x[: max(1, MAX_QUANTILE_VALUES // x.shape[1])]
            self.edges = torch.quantile(first, QUANTILE_LEVELS.to(x), dim=0).T.contiguous()
            shape = 2, self.concepts + 1, x.shape[1], len(QUANTILE_LEVELS) + 1
            self.counts = torch.zeros(shape, dtype=torch.int32, device=x.device)
        d, bins = self.counts.shape[2:]
        units, at_once = torch.arange(d, device=x.device), max(1, STRENGTHS_AT_ONCE // d)
        parts = (tensor.split(at_once) for tensor in (x, member, half))
        for values, *groups in zip(*parts, strict=True):
            level = torch.searchsorted(self.edges, values.T.contiguous(), right=True).T  # [n, d]
            token, group = _pair_with_concepts(*groups)
            _increment(self.counts, (group[:, None] * d + units) * bins + level[token])

    def result(self) -> StrengthCounts:
        """The counts of all tokens added so far, on the CPU."""
        return StrengthCounts(self.counts.cpu(), self.edges.cpu(), signed=True)


def _pair_with_concepts(member: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """One pair for each concept of each token -> index of the token, flat index into counts[half,
    concept]; every token belongs to the last concept."""
    member = torch.cat([member, torch.ones_like(member[:, :1])], dim=1)
    token, concept = member.nonzero(as_tuple=True)
    return token, half[token] * member.shape[1] + concept


def _increment(counts: Tensor, indices: Tensor) -> None:
    """Add 1 at each index into the flattened counts; indices may repeat."""
    indices = indices.flatten()
    counts.view(-1).index_add_(0, indices, torch.ones_like(indices, dtype=torch.int32))


def find_detector(counts: StrengthCounts, concept: int, units: Tensor | None = None) -> Detector:
    """Choose unit and threshold by F1, and the ranker by AUROC, on the first half; score on the
    second. units: indices of the candidates, all by default."""
    units = torch.arange(counts.counts.shape[2]) if units is None else units
    chosen_f1, _, _, aurocs = counts.score_thresholds(0, concept, units)
    side, row, level = (int(i) for i in torch.unravel_index(chosen_f1.argmax(), chosen_f1.shape))
    ranking_side, ranker = (int(i) for i in torch.unravel_index(aurocs.argmax(), aurocs.shape))
    best = units[[row, ranker]]
    f1, precision, recall, auroc = counts.score_thresholds(1, concept, best)
    return Detector(
        unit=int(best[0]),
        below=side == 1,
        threshold=counts.thresholds[best[0], level].item(),
        chosen_f1=chosen_f1[side, row, level].item(),
        f1=f1[side, 0, level].item(),
        precision=precision[side, 0, level].item(),
        recall=recall[side, 0, level].item(),
        ranker=int(best[1]),
        auroc=auroc[ranking_side, 1].item(),
    )
