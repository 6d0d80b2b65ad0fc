"""Everything that is known about each feature, or each neuron: what the page and the files show.

Shapes: units = features of the SAE or neurons of the site; n = examples; k = how many tokens
or units are listed.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BEFORE, AFTER = 20, 11
WINDOW = BEFORE + 1 + AFTER  # tokens of an example; its peak is at index BEFORE
# Strengths are counted in half octaves; the first and the last bin hold what lies outside.
EDGES = 2.0 ** torch.arange(-10, 14.5, 0.5)
INTERVALS = 5  # of strengths, equally wide, from 0 to a unit's maximum


def find_interval(strength: Tensor, maximum: Tensor) -> Tensor:
    """Which of INTERVALS a strength lies in, int64; 0 is the uppermost, with the unit's maximum."""
    share = strength / maximum.clamp_min(torch.finfo(torch.float32).tiny)
    return INTERVALS - (share * INTERVALS).ceil().clamp(1, INTERVALS).long()


class Statistics(NamedTuple):
    """How often and how strongly units fire, [units] unless said otherwise."""

    tokens: int
    """Tokens that were read."""
    fired: Tensor
    """Tokens on which each unit is active, int64."""
    mean: Tensor
    """Mean strength where it is active; 0 where it never is."""
    maximum: Tensor
    """Greatest strength."""
    histogram: Tensor
    """[units, len(EDGES) - 1] tokens on which its strength is between EDGES[i] and EDGES[i + 1],
    int64."""

    @property
    def densities(self) -> Tensor:
        """Share of tokens on which each unit is active."""
        return self.fired / self.tokens


class Examples(NamedTuple):
    """Places in the text where units are active, strongest first."""

    strength: Tensor
    """[units, n] at the peak, the token at index BEFORE of the window; 0 where there are fewer
    examples than n."""
    tokens: Tensor
    """[units, n, WINDOW] ids, int32; -1 beyond the ends of the sequence."""
    strengths: Tensor
    """[units, n, WINDOW] of each token, float16; 0 where tokens is -1."""
    sequence: Tensor
    """[units, n] number of the sequence in the order of reading, int64."""
    position: Tensor
    """[units, n] of the peak in its sequence, int32."""


class TokenSetScores(NamedTuple):
    """How well the best set of tokens predicts where units are active."""

    score: Tensor
    """[units] correlation of being in the set with firing (Matthews' coefficient: 1 is perfect, 0
    is chance) on text that the set was not chosen on; nan where a unit fires too rarely to say."""
    tokens: Tensor
    """[units, k] ids of the set's most frequent tokens, int32; -1 where there are fewer."""
    previous: Tensor
    """[units] bool: it is the token before that predicts, not the active one itself."""


class RelatedUnits(NamedTuple):
    """Units that are like each unit, the closest first."""

    units: Tensor
    """[units, k] int64; -1 where there are fewer."""
    likeness: Tensor
    """[units, k]"""


class LogitEffect(NamedTuple):
    """Tokens that a unit makes likelier and unlikelier through the unembedding."""

    promoted: Tensor
    """[units, k] ids, the most promoted first, int64"""
    suppressed: Tensor
    """[units, k] ids, the most suppressed first, int64"""
    sharpness: Tensor
    """[units] excess kurtosis of the effect over the vocabulary: large where it is on few tokens"""


class Catalogue(NamedTuple):
    """All units of one kind."""

    kind: str
    """feature or neuron"""
    vocabulary: list[str]
    """Each token id as it reads, with its space."""
    texts: np.ndarray
    """[sequences, context] ids of all that was read, int32; no tensor, as it is not of units."""
    statistics: Statistics
    top: Examples
    """The strongest, at most one in a sequence."""
    spread: Examples
    """Random ones of each of INTERVALS, of an interval at most one in a sequence; none of `top`."""
    token_sets: TokenSetScores | None = None
    """None for neurons, which are always active."""
    telling: Tensor | None = None
    """[units] how much each tells a reader who sees it first, nan where that is not known."""
    copy_of: Tensor | None = None
    """[units] the unit under which each is shown: itself, unless it is a copy of a more telling
    one, int64."""
    neighbours: RelatedUnits | None = None
    """By the cosine of decoder rows; None for neurons."""
    partners: RelatedUnits | None = None
    """By how often they fire together (Jaccard: both / either); None for neurons."""
    effect: LogitEffect | None = None
    """None where the site does not write into the residual stream."""

    @property
    def unit_count(self) -> int:
        """Number of units."""
        return len(self.statistics.fired)


def slice_units(part: Any, which: slice) -> Any:
    """Some units of a catalogue, or of a part of one: views of its tensors, which all have an entry
    for each unit."""
    if isinstance(part, Tensor):
        return part[which]
    if isinstance(part, tuple):
        return part._replace(**{n: slice_units(each, which) for n, each in part._asdict().items()})
    return part
