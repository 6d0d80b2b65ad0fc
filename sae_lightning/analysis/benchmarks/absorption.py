"""Absorption: is a concept's feature silent where a more specific one fires? Splitting: are there
several features of the concept?

A dictionary that writes "starts with S" with the feature for "short" needs one feature less: the
feature for S becomes silent on "short", and nobody who looks at its examples sees that (Chanin et
al. 2024, "A is for Absorption", arXiv 2409.14507). It is counted as in SAEBench (Karvonen et al.
2025, arXiv 2503.09532, "Feature absorption"): by what a feature writes in the direction of a probe.
The original count ablates features instead, which works only in layers before attention has moved
the letter away from its word.

Shapes: n = samples, d = width of the target site, concepts; features = those of the SAE.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from sae_lightning.analysis.probing.linear import allow_early_stopping
from sae_lightning.sae import SAE

# Thresholds of SAEBench.
SPLIT_GAIN = 0.03  # F1 that one more feature must add to count as a feature of the concept
MAX_OWN_FEATURES = 10
ABSORBED_SHARE = 0.4  # least share of the activation's projection that other features write
ABSORBING_COSINE = 0.025  # least cosine with the probe, for a feature that absorbs alone
PARTLY_ABSORBING_COSINE = 0.1  # and for one of several
MAX_ABSORBING = 3

ENCODED_AT_ONCE = 1024
L1_PENALTY = 0.01
ITERATIONS = 100  # of L-BFGS; 150 change no F1 by 0.01
ROUNDING = 1e-3  # weights far below it count as 0 in the L1 penalty


class SampleOutcomes(NamedTuple):
    """What happens on each of the samples [n] that have a concept."""

    silent: Tensor
    """bool: no feature of the concept fires"""
    absorbed: Tensor
    """bool: silent, and the feature that writes most in the concept's direction writes at least
    40 % of the activation's projection (full absorption)"""
    fraction: Tensor
    """share of what is written in that direction that other features write (absorption fraction)"""
    absorbing: Tensor
    """int64: the feature that writes most in that direction"""


def count_absorption(
    features: Tensor, x: Tensor, direction: Tensor, W_dec: Tensor, own: list[int]
) -> SampleOutcomes:
    """Count absorption on samples that have a concept.

    features: strengths [n, features]; x: activations [n, d] that the SAE reconstructs; direction:
    [d] of norm 1, along which the concept lies; own: the concept's own features.
    """
    cosine = cosine_similarity(W_dec, direction[None], dim=1)
    # along the direction: what the activation has, and what each feature writes
    projection, written = x @ direction, features * (W_dec @ direction)
    silent = (features[:, own] == 0).all(dim=1)
    largest, absorbing = written.max(dim=1)
    absorbed = silent & (projection > 0) & (largest >= ABSORBED_SHARE * projection)
    absorbed &= cosine[absorbing] >= ABSORBING_COSINE

    by_own = written[:, own].sum(dim=1)
    by_others = written.clamp(min=0) * (cosine >= PARTLY_ABSORBING_COSINE)
    by_others[:, own] = 0
    by_others = by_others.topk(min(MAX_ABSORBING, len(W_dec))).values.sum(dim=1)
    taken = torch.minimum(by_others, projection - by_own)
    none = (projection <= 0) | (by_own >= projection) | (by_others < ABSORBED_SHARE * projection)
    fraction = torch.where(none, 0.0, taken / (taken + by_own.clamp(min=0)))
    return SampleOutcomes(silent, absorbed, fraction, absorbing)


class SampleParts(NamedTuple):
    """Which samples [n] are used for what; bool."""

    fit: Tensor
    """To fit probes and rank features."""
    choose: Tensor
    """To choose how many features a concept has."""
    test: Tensor
    """To be counted and scored on."""


class ConceptSamples(NamedTuple):
    """Samples with the concepts that each has, and the concepts' directions."""

    noun: str
    """What a concept is: letter, parent concept."""
    concepts: list[str]
    names: list[str]
    """Names of the samples [n]."""
    source: Tensor
    """[n, d_in] activations that the SAE reads"""
    target: Tensor
    """[n, d] activations that it reconstructs"""
    labels: Tensor
    """[n, concepts] bool: which concepts a sample has"""
    detected: Tensor
    """[n, concepts] bool: which concepts a probe detects in its activation"""
    directions: Tensor
    """[concepts, d] of norm 1"""
    parts: SampleParts
    probe_f1: list[float]
    """F1 of `detected` on tested samples, by concept."""
    children: Tensor | None = None
    """[n, concepts] bool: whether a child of the concept is active, where that is known"""


class ConceptResult(NamedTuple):
    """Absorption and splitting of one concept; shares are of the tested samples that have it and in
    which the probe detects it."""

    concept: str
    samples: int
    """Number of these samples."""
    probe_f1: float
    features: list[int]
    """The concept's own features, the most predictive first; more than one if it is split, empty if
    the SAE has none."""
    f1: float
    """F1 on tested samples of a probe that reads these features alone."""
    silent: float
    """Share on which none of them fires; NaN, like the next two, if the concept has no features."""
    absorbed: float
    """Share on which none fires and a single other feature takes over (full absorption)."""
    fraction: float
    """Mean share of the concept that other features write (absorption fraction)."""
    examples: list[tuple[str, int]]
    """Absorbed samples, with the absorbing feature."""
    silent_with_child: float = math.nan
    """Where children are known, share of samples with a child on which the feature closest to the
    concept's direction is silent: absorption, measured without a probe."""
    silent_without: float = math.nan
    """The same share of samples without a child."""


class OwnFeatures(NamedTuple):
    """The features of one concept."""

    features: list[int]
    """The most predictive first; more than one if the concept is split, empty if it has none."""
    f1: float
    """F1 on the tested samples of a probe that reads these features alone; 0 without any."""


def find_own_features(features: Tensor, labels: Tensor, parts: SampleParts) -> list[OwnFeatures]:
    """Find each concept's features, from strengths [n, features] and labels [n, concepts] (bool).

    As in the paper: a probe with an L1 penalty ranks the features, and probes on the first k of
    them are compared. The k-th is the concept's own if it adds more than 0.03 to F1. Features with
    a negative weight are not the concept's own.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    fitted = features[parts.fit]
    scale = fitted[fitted > 0].square().mean().sqrt()
    features = features / scale.nan_to_num(1.0)  # LLMs differ in scale; NaN if all are silent
    weights, _ = fit_one_against_rest(features[parts.fit], labels[parts.fit], l1=L1_PENALTY)
    fit, choose, test = (features[part].numpy() for part in parts)
    fit_labels, choose_labels, test_labels = (labels[part].numpy() for part in parts)
    result = []
    for c, of_concept in enumerate(weights):
        best, own, f1 = -1.0, [], 0.0
        count = min(MAX_OWN_FEATURES, int((of_concept > 0).sum()))
        ranked = of_concept.topk(count).indices.tolist()
        for k in range(1, len(ranked) + 1):
            with allow_early_stopping():
                probe = LogisticRegression(class_weight="balanced", max_iter=500)
                probe.fit(fit[:, ranked[:k]], fit_labels[:, c])
            chosen_f1 = f1_score(choose_labels[:, c], probe.predict(choose[:, ranked[:k]]))
            if chosen_f1 <= best + SPLIT_GAIN:
                break
            best, own = chosen_f1, ranked[:k]
            f1 = f1_score(test_labels[:, c], probe.predict(test[:, own]))
        result.append(OwnFeatures(own, f1))
    return result


@torch.no_grad()
def measure_absorption(samples: ConceptSamples, sae: SAE) -> list[ConceptResult]:
    """Count absorption and splitting of each concept in an SAE that takes raw activations."""
    encoded = [
        sae.encode(x.to(sae.W_enc.device)).cpu().to_sparse()
        for x in samples.source.split(ENCODED_AT_ONCE)
    ]
    used = torch.cat([x.indices()[1] for x in encoded]).unique()  # features that ever fire
    used = used if len(used) else torch.tensor([0])  # a silent SAE
    features = torch.cat([x.index_select(1, used).to_dense() for x in encoded])
    W_dec, results = sae.W_dec.detach().cpu()[used], []
    own_features = find_own_features(features, samples.labels, samples.parts)
    for c, (concept, own) in enumerate(zip(samples.concepts, own_features, strict=True)):
        rows = samples.parts.test & samples.labels[:, c] & samples.detected[:, c]
        rows = rows.nonzero().squeeze(1)
        outcomes = count_absorption(
            features[rows], samples.target[rows], samples.directions[c], W_dec, own.features
        )
        shares, absorbed, with_children = [math.nan] * 3, [], {}
        if own.features:
            shares = [share.float().mean().item() for share in outcomes[:3]]
            absorbed = outcomes.absorbed.nonzero().squeeze(1).tolist()
        if samples.children is not None:
            child = samples.children[rows, c]
            closest = cosine_similarity(W_dec, samples.directions[c][None], dim=1).argmax()
            silent = (features[rows, closest] == 0).float()
            with_children["silent_with_child"] = silent[child].mean().item()
            with_children["silent_without"] = silent[~child].mean().item()
        results.append(
            ConceptResult(
                concept=concept,
                samples=len(rows),
                probe_f1=samples.probe_f1[c],
                features=used[own.features].tolist(),
                f1=own.f1,
                silent=shares[0],
                absorbed=shares[1],
                fraction=shares[2],
                examples=[
                    (samples.names[rows[i]], int(used[outcomes.absorbing[i]])) for i in absorbed
                ],
                **with_children,
            )
        )
    return results


def list_known(results: Sequence[ConceptResult], field: str) -> list[float]:
    """The values of a field of `ConceptResult` that are not NaN."""
    values = [getattr(result, field) for result in results]
    return [value for value in values if not math.isnan(value)]


def fit_one_against_rest(
    x: Tensor, labels: Tensor, *, l1: float = 0.0, l2: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression for each concept, on x [n, units] and labels [n, concepts] (bool)
    -> weights [concepts, units] and biases [concepts].

    Both classes weigh the same; the penalties are `l1` |w| (rounded at 0) and `l2` |w|^2.
    """
    target = labels.to(x.dtype)
    share = target.mean(dim=0).clamp(1 / len(x), 1 - 1 / len(x))
    importance = torch.where(labels, 0.5 / share, 0.5 / (1 - share))
    weights = torch.zeros(labels.shape[1], x.shape[1], requires_grad=True)
    biases = torch.zeros(labels.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def compute_loss() -> Tensor:
        solver.zero_grad()
        logits = x @ weights.T + biases
        loss = binary_cross_entropy_with_logits(logits, target, importance, reduction="none")
        squares = weights.square()
        penalty = l1 * (squares + ROUNDING**2).sqrt().sum() + l2 * squares.sum()
        total = loss.mean(dim=0).sum() + penalty
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(compute_loss)
    return weights.detach(), biases.detach()
