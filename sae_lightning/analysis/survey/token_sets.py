"""The simplest interpretation of a feature: a set of tokens on which it fires.

For each feature, tokens are ranked by P(fires | token). The feature's set is the prefix of the
ranking whose membership correlates best with firing. The set is chosen on one half of the text and
scored on the other, and vice versa. One set is of tokens on which the feature fires (shift 0), one
of tokens just before (shift 1); the better one is kept.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array

from sae_lightning.analysis.survey.sample import Sample, rank_in_runs
from sae_lightning.report.catalogue import TokenSetScores

MIN_FIRINGS = 5  # a feature needs this many in each half of the text to get a score
MIN_FIRINGS_PER_TOKEN = 2  # a token needs this many to enter a feature's set
LISTED_TOKENS = 8
MIN_LISTED_SHARE = 0.02  # a listed token has at least this share of the firings on its set


class _Counts(NamedTuple):
    """Counts over one part of the text."""

    firings: csr_array
    """[features, vocabulary] how often each feature fires on each token"""
    occurrences: np.ndarray
    """[vocabulary] how often each token occurs"""

    @property
    def total_firings(self) -> np.ndarray:
        """[features] how often each feature fires"""
        return self.firings.sum(axis=1)


class _Sets(NamedTuple):
    """The token sets of all features: one entry per member, sorted by feature, then by falling
    firings / (occurrences + 1). (Without the 1, tokens that occur only twice would lead.)"""

    feature: np.ndarray
    """[members]"""
    token: np.ndarray
    """[members]"""
    firings: np.ndarray
    """[members] how often the feature fires on that token"""
    score: np.ndarray
    """[features] correlation on the text that the set was chosen on; 0 for an empty set"""


def score_token_sets(sample: Sample, vocabulary: int) -> TokenSetScores:
    """Choose the best token set of every feature, and score how well it predicts firing; a feature
    that fires on fewer than MIN_FIRINGS tokens of a half gets no set and a score of NaN."""
    scores, sets = [], []  # one of each for each shift
    for shift in (0, 1):
        a, b = _count_halves(sample, vocabulary, shift)
        # each set is tested on the half that it was not chosen on, and the counts are added up
        on_b, on_a = _count_hits(_choose_sets(a), b), _count_hits(_choose_sets(b), a)
        summed = [count_a + count_b for count_a, count_b in zip(on_a, on_b, strict=True)]
        scores.append(_correlate(*summed))
        sets.append(_choose_sets(_Counts(a.firings + b.firings, a.occurrences + b.occurrences)))
    # shift and listed tokens come from all of the text, the score from the held-out halves
    previous = sets[1].score > sets[0].score
    score = np.where(previous, scores[1], scores[0])
    # `a` and `b` are of shift 1; the totals of shift 0 are the same
    is_frequent = np.minimum(a.total_firings, b.total_firings) >= MIN_FIRINGS
    tokens = np.where(previous[:, None], _list_tokens(sets[1]), _list_tokens(sets[0]))
    return TokenSetScores(
        score=torch.from_numpy(np.where(is_frequent, score, np.nan)).float(),
        tokens=torch.from_numpy(np.where(is_frequent[:, None], tokens, -1)).int(),
        previous=torch.from_numpy(previous),
    )


def _count_halves(sample: Sample, vocabulary: int, shift: int) -> list[_Counts]:
    """Count over even and over odd sequences. A firing counts for the token `shift` (0 or 1) places
    earlier, which is in the same sequence, because nothing fires on BOS."""
    context = sample.tokens.shape[1]
    tokens = sample.tokens.flatten().long().numpy()
    kept = sample.keep.flatten().nonzero().squeeze(1).numpy()
    places, entry_units = sample.places.numpy(), sample.list_entry_units().numpy()
    halves = []
    for half in (0, 1):
        in_half = (places // context) % 2 == half
        pairs = entry_units[in_half], tokens[places[in_half] - shift]
        ones, shape = np.ones(len(pairs[0]), np.int64), (sample.unit_count, vocabulary)
        read = tokens[kept[(kept // context) % 2 == half] - shift]
        firings = csr_array((ones, pairs), shape=shape)  # adds up equal pairs
        halves.append(_Counts(firings, np.bincount(read, minlength=vocabulary)))
    return halves


def _choose_sets(counts: _Counts) -> _Sets:
    """Choose the token set of each feature whose membership correlates best with its firing."""
    is_frequent = counts.firings.data >= MIN_FIRINGS_PER_TOKEN
    firings = counts.firings.data[is_frequent]
    feature, token = (indices[is_frequent] for indices in counts.firings.nonzero())
    occurrences = counts.occurrences[token]
    order = np.lexsort((-firings / (occurrences + 1), feature))  # candidates, sorted as in `_Sets`
    feature, token = feature[order], token[order]
    firings, occurrences = firings[order], occurrences[order]
    rank = rank_in_runs(feature)
    start = np.arange(len(feature)) - rank  # index of the first candidate of the same feature
    # cumulative sums that restart at each feature: minus the sum before its first candidate
    hits, size = firings.cumsum(), occurrences.cumsum()
    hits, size = hits - (hits - firings)[start], size - (size - occurrences)[start]
    totals = counts.total_firings
    correlation = _correlate(hits, size, totals[feature], counts.occurrences.sum())
    score = np.zeros(len(totals))
    if not len(feature):
        return _Sets(feature, token, firings, score)
    first = np.flatnonzero(rank == 0)
    score[feature[first]] = np.maximum.reduceat(correlation, first).clip(min=0)
    ends = np.flatnonzero((correlation == score[feature]) & (correlation > 0))  # of best prefixes
    # `unique` finds the first end for each feature: of equally good prefixes, the shortest
    scored, where = np.unique(feature[ends], return_index=True)
    last = np.full(len(totals), -1)  # rank of the last member of each set
    last[scored] = rank[ends[where]]
    inside = rank <= last[feature]
    return _Sets(feature[inside], token[inside], firings[inside], score)


def _count_hits(sets: _Sets, counts: _Counts) -> tuple[np.ndarray, ...]:
    """Count for each feature: tokens in its set on which it fires, tokens in its set, tokens on
    which it fires; and count all tokens."""
    ones = np.ones(len(sets.token), np.int64)
    members = csr_array((ones, (sets.feature, sets.token)), shape=counts.firings.shape)
    hits = members.multiply(counts.firings).sum(axis=1)
    return hits, members @ counts.occurrences, counts.total_firings, counts.occurrences.sum()


def _correlate(
    hits: np.ndarray, size: np.ndarray, firings: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Matthews correlation coefficient of membership and firing, from the counts of `_count_hits`;
    0 where either is constant."""
    size, firings, tokens = (np.asarray(x, float) for x in (size, firings, tokens))
    scale = np.sqrt(size * (tokens - size)) * np.sqrt(firings * (tokens - firings))
    return np.divide(
        hits * tokens - size * firings, scale, where=scale > 0, out=np.zeros_like(scale)
    )


def _list_tokens(sets: _Sets) -> np.ndarray:
    """List the tokens [features, LISTED_TOKENS] of each set on which the feature fires most often,
    without those below MIN_LISTED_SHARE; padded with -1."""
    features = len(sets.score)
    order = np.lexsort((-sets.firings, sets.feature))
    hits = np.bincount(sets.feature, sets.firings, minlength=features)
    is_listed = sets.firings >= MIN_LISTED_SHARE * hits[sets.feature]
    order = order[is_listed[order]]
    feature, token = sets.feature[order], sets.token[order]
    rank = rank_in_runs(feature)
    tokens, fits = np.full((features, LISTED_TOKENS), -1), rank < LISTED_TOKENS
    tokens[feature[fits], rank[fits]] = token[fits]
    return tokens
