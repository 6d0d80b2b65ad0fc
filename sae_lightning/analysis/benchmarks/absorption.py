"""Is the feature of a concept silent where a more specific feature fires, and is it split?

A dictionary that writes "starts with S" with the feature for "short" needs one feature less: the
feature for S becomes silent on "short", and nobody who looks at its examples sees that (Chanin et
al. 2024, "A is for Absorption", arXiv 2409.14507). It is counted as in SAEBench (Karvonen et al.
2025, arXiv 2503.09532, "Feature absorption"): a feature absorbs by what it writes in the direction
of a probe. The original count ablates features instead, which works only in layers before
attention has moved the letter away from its word.

Shapes: n = samples, d = width of the target site, concepts; features = those of the SAE.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from sae_lightning.analysis.probing.linear import allow_early_stopping

# Thresholds of SAEBench.
SPLIT_GAIN = 0.03  # F1 that one more feature must add to count as a feature of the concept
MOST_SPLITS = 10
ABSORBED_SHARE = 0.4  # of the activation's projection, that must be written by other features
ABSORBING_COSINE = 0.025  # with the probe's direction, for a feature that absorbs alone
PARTLY_ABSORBING_COSINE = 0.1  # and for one of several
MOST_ABSORBING = 3

L1_PENALTY = 0.01
STEPS, FIRST_LR, LAST_LR = 300, 0.03, 1e-4  # of Adam, on all samples at once


class Rates(NamedTuple):
    """What happens on samples [n] that have a concept."""

    silent: Tensor
    """bool: no feature of the concept fires"""
    absorbed: Tensor
    """bool: silent, and the feature that writes most of the concept's direction writes at least 40 %
    of it (full absorption)"""
    fraction: Tensor
    """share of what is written in that direction that other features write (absorption fraction)"""
    absorbing: Tensor
    """int64: the feature that writes most in that direction"""


def count_absorption(
    features: Tensor, x: Tensor, direction: Tensor, W_dec: Tensor, own: list[int]
) -> Rates:
    """Count absorption on samples that have a concept.

    features: strengths [n, features]; x: activations [n, d] that the SAE reconstructs; direction:
    [d] of norm 1, along which the concept lies; own: the concept's own features.
    """
    along = W_dec @ direction
    cosine = cosine_similarity(W_dec, direction[None], dim=1)
    needed, written = x @ direction, features * along
    silent = (features[:, own] == 0).all(dim=1)
    most, absorbing = written.max(dim=1)
    absorbed = silent & (needed > 0) & (most >= ABSORBED_SHARE * needed)
    absorbed &= cosine[absorbing] >= ABSORBING_COSINE

    by_own = written[:, own].sum(dim=1)
    by_others = written.clamp(min=0) * (cosine >= PARTLY_ABSORBING_COSINE)
    by_others[:, own] = 0
    by_others = by_others.topk(min(MOST_ABSORBING, len(along))).values.sum(dim=1)
    taken = torch.minimum(by_others, needed - by_own)
    none = (needed <= 0) | (by_own >= needed) | (by_others < ABSORBED_SHARE * needed)
    fraction = torch.where(none, 0.0, taken / (taken + by_own.clamp(min=0)))
    return Rates(silent, absorbed, fraction, absorbing)


class OwnFeatures(NamedTuple):
    """The features of one concept."""

    features: list[int]
    """Strongest first; more than one if the concept is split."""
    f1: float
    """F1 on the tested samples of a probe that reads these features alone."""


class Parts(NamedTuple):
    """Which samples [n] are used for what; bool."""

    fit: Tensor
    """To fit probes and rank features."""
    choose: Tensor
    """To choose how many features a concept has."""
    test: Tensor
    """To be counted and scored on."""


def find_own_features(features: Tensor, labels: Tensor, parts: Parts) -> list[OwnFeatures]:
    """Find each concept's features, from strengths [n, features] and labels [n, concepts] (bool).

    As in the paper: a probe with an L1 penalty ranks the features, and probes on the first k of
    them are compared. The k-th is the concept's own if it adds more than 0.03 to F1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    features = features / features[parts.fit].square().mean().sqrt().clamp(min=1e-12)
    weights, _ = fit_one_against_rest(features[parts.fit], labels[parts.fit], l1=L1_PENALTY)
    fit, choose, test = (features[part].numpy() for part in parts)
    of_fit, of_choose, of_test = (labels[part].numpy() for part in parts)
    result = []
    for c, ranked in enumerate(weights.topk(min(MOST_SPLITS, weights.shape[1])).indices.tolist()):
        best, own, f1 = -1.0, [], 0.0
        for k in range(1, len(ranked) + 1):
            with allow_early_stopping():
                probe = LogisticRegression(class_weight="balanced", max_iter=500)
                probe.fit(fit[:, ranked[:k]], of_fit[:, c])
            gain = f1_score(of_choose[:, c], probe.predict(choose[:, ranked[:k]]))
            if gain <= best + SPLIT_GAIN:
                break
            best, own = gain, ranked[:k]
            f1 = f1_score(of_test[:, c], probe.predict(test[:, own]))
        result.append(OwnFeatures(own, f1))
    return result


def fit_one_against_rest(
    x: Tensor, labels: Tensor, *, l1: float = 0.0, l2: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression for each concept, on x [n, units] and labels [n, concepts] (bool)
    -> weights [concepts, units] and biases [concepts].

    Both classes weigh the same; the penalties are `l1` |w| and `l2` |w|^2 for each concept.
    """
    target = labels.to(x.dtype)
    share = target.mean(dim=0).clamp(1 / len(x), 1 - 1 / len(x))
    importance = torch.where(labels, 0.5 / share, 0.5 / (1 - share))
    weights = torch.zeros(labels.shape[1], x.shape[1], requires_grad=True)
    biases = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights, biases], lr=FIRST_LR)
    decay = (LAST_LR / FIRST_LR) ** (1 / STEPS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = x @ weights.T + biases
        loss = binary_cross_entropy_with_logits(logits, target, importance, reduction="none")
        penalty = l1 * weights.abs().sum() + l2 * weights.square().sum()
        (loss.mean(dim=0).sum() + penalty).backward()
        optimizer.step()
        schedule.step()
    return weights.detach(), biases.detach()
