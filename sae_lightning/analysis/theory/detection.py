"""How well single units detect concepts, from counts that do not grow with the text.

    counts[half, concept, unit, bin]     tokens of the concept on which the unit is that strong
                                         (the last concept: all tokens)
    first half of the sequences          -> the unit and the threshold with the best F1
    second half                          -> what they are worth

Shapes: n = tokens, concepts, units = features or neurons, bins.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.report.catalogue import EDGES

STRENGTHS_AT_ONCE = 1 << 20  # strengths sorted into bins at a time: bounds memory
MAX_QUANTILE_VALUES = 1 << 23  # numbers that torch.quantile takes at once; it refuses twice as many
# Ranks at which neurons' values are cut: ever finer towards both ends, where rare concepts are.
_TAIL = 0.5 * 2.0 ** -torch.arange(0, 10.25, 0.25)
QUANTILE_LEVELS = torch.cat([_TAIL.flip(0), 1 - _TAIL[1:]])


class Detector(NamedTuple):
    """A unit with a threshold that stands for a concept."""

    unit: int
    below: bool
    """It says yes below the threshold (a neuron's negative direction)."""
    threshold: float
    chosen_f1: float
    """F1 on the half of the sequences that unit and threshold were chosen on."""
    f1: float
    """F1 on the other half, as all that follows."""
    precision: float
    recall: float
    ranker: int
    """The unit with the best AUROC on the half for choosing."""
    auroc: float
    """Its AUROC on the other half: the probability that a token of the concept ranks above one that
    is none; 0.5 is chance."""


class StrengthCounts(NamedTuple):
    """How strong each unit is on the tokens of each concept, in two halves of the text."""

    counts: Tensor
    """[2, concepts + 1, units, bins] int32; the last concept is that of all tokens"""
    thresholds: Tensor
    """[units, bins - 1] from where on a strength is in the next bin"""
    signed: bool
    """Units have a negative direction too."""

    @property
    def tokens(self) -> Tensor:
        """[2, concepts + 1] in each half."""
        return self.counts[:, :, 0].sum(dim=-1)

    def score_thresholds(self, half: int, concept: int, units: Tensor) -> tuple[Tensor, ...]:
        """F1, precision and recall [sides, units, bins - 1] of saying yes above each threshold,
        and AUROC [sides, units]; the second side, of signed units, is below the threshold."""
        of, all_ = (self.counts[half, c, units].double() for c in (concept, -1))
        total, tokens = of.sum(dim=-1, keepdim=True), all_.sum(dim=-1, keepdim=True)
        # a bin and all above it; a threshold below which nothing lies is none
        right, yes = (each.flip(-1).cumsum(-1).flip(-1)[..., 1:] for each in (of, all_))
        others = all_ - of
        below = others.cumsum(dim=-1) - others / 2  # within a bin half of the others are below
        auroc = (of * below).sum(dim=-1) / (total * (tokens - total))[:, 0]
        if self.signed:
            right, yes = torch.stack([right, total - right]), torch.stack([yes, tokens - yes])
            auroc = torch.stack([auroc, 1 - auroc])
        else:
            right, yes, auroc = right[None], yes[None], auroc[None]
        precision = torch.where(yes > 0, right / yes, 0.0)
        return 2 * right / (yes + total), precision, right / total, auroc


class FeatureCounts:
    """Counts of features by half octaves of strength; bin 0 is silence."""

    def __init__(self, concepts: int, features: int, device: torch.device | str = "cpu"):
        self.edges = EDGES.to(device)
        self.tokens = torch.zeros(2, concepts + 1, dtype=torch.int32, device=device)
        shape = 2, concepts + 1, features, len(EDGES) + 1
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)

    def add(self, strengths: Tensor, member: Tensor, half: Tensor, numbers: Tensor) -> None:
        """Add tokens: [n, some] of the features with these `numbers` [some], bool [n, concepts],
        and 0 or 1 [n]."""
        _increment(self.tokens, _pair_with_concepts(member, half)[1])
        numbers = numbers.to(strengths.device)
        features, bins = self.counts.shape[2:]
        fires = strengths.nonzero(as_tuple=True)
        for tokens, units in zip(*(each.split(STRENGTHS_AT_ONCE) for each in fires), strict=True):
            # what is weaker than all edges is in the first bin of those that fire
            level = torch.bucketize(strengths[tokens, units], self.edges, right=True).clamp(min=1)
            entry, group = _pair_with_concepts(member[tokens], half[tokens])
            _increment(
                self.counts, (group * features + numbers[units[entry]]) * bins + level[entry]
            )

    def result(self) -> StrengthCounts:
        """Of all tokens added so far, on the CPU."""
        counts = self.counts.cpu()
        counts[..., 0] = self.tokens.cpu()[..., None] - counts[..., 1:].sum(dim=-1)
        thresholds = torch.cat([torch.zeros(1), EDGES[1:]]).expand(counts.shape[2], -1)
        return StrengthCounts(counts, thresholds, signed=False)


class NeuronCounts:
    """Counts of a site's dimensions by ranks of their values among the first tokens that come."""

    def __init__(self, concepts: int):
        self.concepts = concepts
        self.edges = self.counts = None

    def add(self, x: Tensor, member: Tensor, half: Tensor) -> None:
        """Add tokens: [n, d], bool [n, concepts], and 0 or 1 [n]."""
        if self.edges is None:
            first = x[: max(1, MAX_QUANTILE_VALUES // x.shape[1])]
            self.edges = torch.quantile(first, QUANTILE_LEVELS.to(x), dim=0).T.contiguous()
            shape = 2, self.concepts + 1, x.shape[1], len(QUANTILE_LEVELS) + 1
            self.counts = torch.zeros(shape, dtype=torch.int32, device=x.device)
        d, bins = self.counts.shape[2:]
        units, at_once = torch.arange(d, device=x.device), max(1, STRENGTHS_AT_ONCE // d)
        for values, *of in zip(*(each.split(at_once) for each in (x, member, half)), strict=True):
            level = torch.searchsorted(self.edges, values.T.contiguous(), right=True).T  # [n, d]
            token, group = _pair_with_concepts(*of)
            _increment(self.counts, (group[:, None] * d + units) * bins + level[token])

    def result(self) -> StrengthCounts:
        """Of all tokens added so far, on the CPU."""
        return StrengthCounts(self.counts.cpu(), self.edges.cpu(), signed=True)


def _pair_with_concepts(member: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Which token belongs to which concept in which half, as pairs of the token and the place in
    counts[half, concept]; every token belongs to the last concept."""
    member = torch.cat([member, torch.ones_like(member[:, :1])], dim=1)
    token, concept = member.nonzero(as_tuple=True)
    return token, half[token] * member.shape[1] + concept


def _increment(counts: Tensor, places: Tensor) -> None:
    """Add 1 at each of the places in the flattened counts; one may come up several times."""
    places = places.flatten()
    counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))


def find_detector(counts: StrengthCounts, concept: int, units: Tensor | None = None) -> Detector:
    """The unit and threshold with the best F1 on the first half, and the unit with the best AUROC,
    scored on the second; `units` [some] are those to choose from, or all."""
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
