"""The cheapest interpretation of a feature: a set of tokens on which it fires.

For each feature tokens are ranked by P(fires | token), and the set is the head of that ranking
whose membership correlates best with firing. It is chosen on one half of the text and scored on the
other, both ways round, for the active token and for the one before it.
"""

from typing import NamedTuple

import numpy as np
import torch

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import Reading

LEAST = 5  # tokens of each half on which a feature has to fire for a score
TWICE = 2  # a token on which it fired once is no pattern
SHOWN = 8
WORTH_SHOWING = 0.02  # share of the tokens on which set and feature agree


class _Counts(NamedTuple):
    """Of one part of the text, for all (feature, token) pairs in which the feature fires."""

    pairs: np.ndarray
    """[pairs] feature * vocabulary + token, ascending"""
    fired: np.ndarray
    """[pairs] how often"""
    tokens: np.ndarray
    """[vocabulary] occurrences of each token"""
    features: np.ndarray
    """[features] tokens on which each fires"""


class _Sets(NamedTuple):
    """The token set of each feature, one row a member: by feature, the surest first."""

    pairs: np.ndarray
    """[members] feature * vocabulary + token"""
    fired: np.ndarray
    """[members] how often the feature fired on that token"""
    score: np.ndarray
    """[features] correlation on the text that it was chosen on; 0 for an empty set"""


def reading(sample: Sample, vocabulary: int) -> Reading:
    """The best token set of every feature, and how well it predicts where the feature fires."""
    here, before = (_folds(sample, vocabulary, shift) for shift in (0, 1))
    scores, chosen = [], []
    for halves in (here, before):
        sets = [_best(half, vocabulary) for half in halves]
        crossed = [
            _confusion(halves[1 - i], sets[i].pairs, vocabulary) for i in (0, 1)
        ]  # each set on the half that it has not seen
        scores.append(_correlation(*(sum(part) for part in zip(*crossed, strict=True))))
        chosen.append(_best(_joined(halves), vocabulary))
    # which of the two is told from all of the text; both scores are of sets that are held out
    previous = chosen[1].score > chosen[0].score
    score = np.where(previous, scores[1], scores[0])
    often = np.minimum(*(half.features for half in here)) >= LEAST
    shown = [_shown(sets, vocabulary, sample.features) for sets in chosen]
    tokens = np.where(previous[:, None], shown[1], shown[0])
    return Reading(
        score=torch.from_numpy(np.where(often, score, np.nan)).float(),
        tokens=torch.from_numpy(np.where(often[:, None], tokens, -1)).int(),
        previous=torch.from_numpy(previous),
    )


def _folds(sample: Sample, vocabulary: int, shift: int) -> list[_Counts]:
    """Counts of the even and the odd sequences; the tokens are those `shift` places before."""
    context = sample.tokens.shape[1]
    tokens = sample.tokens.flatten().long().numpy()
    kept = sample.keep.flatten().nonzero().squeeze(1).numpy()
    places, owners = sample.places.numpy(), sample.owners().numpy()
    folds = []
    for half in (0, 1):
        mine = (places // context) % 2 == half
        token, feature = tokens[places[mine] - shift], owners[mine]
        pairs, fired = np.unique(feature * vocabulary + token, return_counts=True)
        read = tokens[kept[(kept // context) % 2 == half] - shift]
        folds.append(
            _Counts(
                pairs,
                fired,
                np.bincount(read, minlength=vocabulary),
                np.bincount(feature, minlength=sample.features),
            )
        )
    return folds


def _joined(folds: list[_Counts]) -> _Counts:
    pairs, where = np.unique(np.concatenate([f.pairs for f in folds]), return_inverse=True)
    fired = np.bincount(where, np.concatenate([f.fired for f in folds])).astype(np.int64)
    a, b = folds
    return _Counts(pairs, fired, a.tokens + b.tokens, a.features + b.features)


def _best(counts: _Counts, vocabulary: int) -> _Sets:
    """The set of each feature whose membership correlates best with its firing."""
    often = counts.fired >= TWICE
    pairs, fired = counts.pairs[often], counts.fired[often]
    feature, token = np.divmod(pairs, vocabulary)
    occurs = counts.tokens[token]
    order = np.lexsort((-fired / (occurs + 1), feature))
    pairs, fired, feature, occurs = (x[order] for x in (pairs, fired, feature, occurs))
    first, rank = _runs(feature)
    start = np.arange(len(feature)) - rank
    hits, size = fired.cumsum(), occurs.cumsum()
    # cumulative sums start again with each feature
    hits, size = hits - (hits - fired)[start], size - (size - occurs)[start]
    correlation = _correlation(hits, size, counts.features[feature], counts.tokens.sum())
    score = np.zeros(len(counts.features))
    if not len(feature):
        return _Sets(pairs, fired, score)
    best = np.maximum.reduceat(correlation, first)
    score[feature[first]] = best.clip(min=0)
    at_best = np.flatnonzero((correlation == score[feature]) & (correlation > 0))
    owner, where = np.unique(feature[at_best], return_index=True)  # of equally good heads the first
    last = np.full(len(counts.features), -1)
    last[owner] = rank[at_best[where]]
    inside = rank <= last[feature]
    return _Sets(pairs[inside], fired[inside], score)


def _runs(feature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal values begins, and the place [n] of each value in its run."""
    first = np.flatnonzero(np.diff(feature, prepend=-1))
    lengths = np.diff(np.append(first, len(feature)))
    return first, np.arange(len(feature)) - np.repeat(first, lengths)


def _confusion(
    counts: _Counts, members: np.ndarray, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each feature: hits, tokens in its set, tokens on which it fires; and all tokens."""
    feature, token = np.divmod(members, vocabulary)
    fired = np.zeros(len(members))
    _, of_member, of_pair = np.intersect1d(members, counts.pairs, True, return_indices=True)
    fired[of_member] = counts.fired[of_pair]
    features = len(counts.features)
    return (
        np.bincount(feature, fired, minlength=features),
        np.bincount(feature, counts.tokens[token], minlength=features),
        counts.features,
        counts.tokens.sum(),
    )


def _correlation(
    hits: np.ndarray, size: np.ndarray, fired: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Matthews' coefficient of two yes/no variables; 0 where one of them never changes."""
    size, fired, tokens = (np.asarray(x, float) for x in (size, fired, tokens))
    spread = np.sqrt(size * (tokens - size)) * np.sqrt(fired * (tokens - fired))
    return np.divide(
        hits * tokens - size * fired, spread, where=spread > 0, out=np.zeros_like(spread)
    )


def _shown(sets: _Sets, vocabulary: int, features: int) -> np.ndarray:
    """The SHOWN most frequent members of each set [features, SHOWN], without those that explain
    next to nothing of its firing; -1 where there are fewer."""
    feature, token = np.divmod(sets.pairs, vocabulary)
    order = np.lexsort((-sets.fired, feature))
    hits = np.bincount(feature, sets.fired, minlength=features)
    order = order[(sets.fired >= WORTH_SHOWING * hits[feature])[order]]
    feature, token = feature[order], token[order]
    _, rank = _runs(feature)
    shown = np.full((features, SHOWN), -1)
    near = rank < SHOWN
    shown[feature[near], rank[near]] = token[near]
    return shown
