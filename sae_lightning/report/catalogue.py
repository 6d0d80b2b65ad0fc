"""The catalogue: statistics, examples and relations of every feature, or of every neuron.

Pages and parquet files show it. Shapes: units = features of the SAE or neurons of the site;
n = examples; k = length of a list of tokens or units.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# An example is a window of tokens around its peak, which is at index BEFORE.
BEFORE, AFTER = 20, 11
WINDOW = BEFORE + 1 + AFTER
# Edges of the histogram of strengths, half an octave apart (a factor of sqrt(2)). Outliers go into
# the outermost bins.
EDGES = 2.0 ** torch.arange(-10, 14.5, 0.5)
INTERVALS = 5  # equally wide intervals of strength from 0 to a unit's maximum
LINEAR_BINS = 50  # equally wide bins of a histogram: 10 for each interval of strengths


def find_interval(strength: Tensor, maximum: Tensor) -> Tensor:
    """Find the index of the interval that each strength lies in, int64; 0 is the top interval,
    which holds the maximum, and INTERVALS - 1 the lowest, which holds 0."""
    share = strength / maximum.clamp_min(torch.finfo(torch.float32).tiny)
    return INTERVALS - (share * INTERVALS).ceil().clamp(1, INTERVALS).long()


class Statistics(NamedTuple):
    """How often and how strongly units fire; each tensor is [units] unless stated otherwise."""

    tokens: int
    """Number of tokens that the statistics are over."""
    firing_counts: Tensor
    """Number of tokens on which each unit is active, int64."""
    mean: Tensor
    """Mean strength over the tokens where the unit is active; 0 if it never is."""
    maximum: Tensor
    histogram: Tensor
    """[units, len(EDGES) - 1] number of tokens with a strength from EDGES[i] to EDGES[i + 1],
    int64."""

    @property
    def densities(self) -> Tensor:
        """[units] share of tokens on which each unit is active."""
        return self.firing_counts / self.tokens


class Examples(NamedTuple):
    """Windows of text around tokens where units are active, strongest first."""

    peak_strength: Tensor
    """[units, n] strength at the peak, which is token BEFORE of the window; 0 where a unit has
    fewer than n examples."""
    tokens: Tensor
    """[units, n, WINDOW] token ids, int32; -1 outside the sequence."""
    strengths: Tensor
    """[units, n, WINDOW] strength on each token, float16; 0 where tokens is -1."""
    sequence: Tensor
    """[units, n] index of the sequence in the text, int64."""
    position: Tensor
    """[units, n] index of the peak in its sequence, int32."""


class TokenSetScores(NamedTuple):
    """How well the best set of tokens for each unit predicts where the unit is active."""

    score: Tensor
    """[units] Matthews correlation between the token being in the set and the unit firing (1 is
    perfect, 0 is chance), on the half of the text that the set was not chosen on; NaN where a
    unit fires too rarely."""
    tokens: Tensor
    """[units, k] ids of the set's most frequent tokens, int32; padded with -1."""
    previous: Tensor
    """[units] bool: True if the set is of tokens just before the unit fires, False if it is of
    tokens on which the unit fires."""


class RelatedUnits(NamedTuple):
    """The units most similar to each unit, closest first."""

    units: Tensor
    """[units, k] int64; padded with -1."""
    similarity: Tensor
    """[units, k] a cosine or a Jaccard index with each of `units`."""


class LogitEffect(NamedTuple):
    """Tokens whose logits a unit raises and lowers most, as `task=lens` computes it."""

    promoted: Tensor
    """[units, k] token ids, the most raised first, int64"""
    suppressed: Tensor
    """[units, k] token ids, the most lowered first, int64"""
    sharpness: Tensor
    """[units] excess kurtosis of the effect over the vocabulary: large if few tokens get most of
    it"""
    raised: Tensor | None = None
    """[units, k] change of each promoted token's logit for a strength of 1; of unknown scale with
    direct=true. Files of older versions lack `raised`, `lowered` and `histogram`."""
    lowered: Tensor | None = None
    """[units, k] change of each suppressed token's logit, mostly negative"""
    histogram: Tensor | None = None
    """[units, LINEAR_BINS] number of tokens by the change of their logit, in equally wide bins from
    lowered[:, 0] to raised[:, 0], int64"""


class Catalogue(NamedTuple):
    """Everything that is known about all features, or all neurons."""

    kind: str
    """'feature' or 'neuron'."""
    vocabulary: list[str]
    """Text of each token id, with its leading space."""
    token_ids: np.ndarray
    """[sequences, context] token ids of the text, int32. Not a tensor, because `slice_units`
    slices every tensor by unit."""
    statistics: Statistics
    top: Examples
    """The strongest examples, at most one per sequence."""
    random: Examples
    """Random examples from each interval of strengths; at most one per sequence and interval, and
    none that is in `top`."""
    token_sets: TokenSetScores | None = None
    """None for neurons, which are active on most tokens."""
    informativeness: Tensor | None = None
    """[units] how informative each feature is at first sight, 0 to 1 (see
    analysis/survey/informativeness.py); NaN where unknown."""
    copy_of: Tensor | None = None
    """[units] the unit under which each unit is listed, int64: itself, or a more informative unit
    that it is a copy of."""
    neighbours: RelatedUnits | None = None
    """By cosine similarity of decoder rows; None for neurons."""
    partners: RelatedUnits | None = None
    """By Jaccard index: tokens where both fire / tokens where either fires; None for neurons."""
    effect: LogitEffect | None = None
    """None for neurons."""
    linear_histogram: Tensor | None = None
    """[units, LINEAR_BINS] number of tokens with a strength in each bin from 0 to the maximum,
    int64; estimated from a sample if the text is long. None for neurons and in files of older
    versions."""

    @property
    def num_units(self) -> int:
        """Number of features or neurons."""
        return len(self.statistics.firing_counts)


def slice_units(part: Any, units: slice | Tensor) -> Any:
    """Take some units of a catalogue, or of one of its fields; with a slice, tensors are views."""
    if isinstance(part, Tensor):
        return part[units]
    if isinstance(part, tuple):
        return part._replace(**{name: slice_units(x, units) for name, x in part._asdict().items()})
    return part
