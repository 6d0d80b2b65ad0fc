"""Absorption: is a concept's feature silent where a more specific one fires? Splitting: are there
several features of the concept?

If the feature of "short" also writes "starts with S", an SAE needs one active feature fewer. The
feature of S is then silent on "short", although all of its examples start with S (Chanin et al.
2024, "A is for Absorption", arXiv 2409.14507). Absorption is counted as in SAEBench (Karvonen et
al. 2025, arXiv 2503.09532): by what a feature writes in the direction of a probe's weights.

A concept's *own features* are those that predict it (`find_own_features`). With the strength f,
feature i *writes* f * (W_dec[i] @ direction) in a direction.

Shapes: n = samples, d = width of the target site; concepts, features (of the SAE).
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
MAX_OWN_FEATURES = 10  # of a concept
ABSORBED_SHARE = 0.4  # absorbing features write at least this share of the activation's projection
ABSORBING_COSINE = 0.025  # a feature that absorbs alone has at least this cosine with the direction
PARTLY_ABSORBING_COSINE = 0.1  # the same, for one of several features that absorb together
MAX_ABSORBING = 3  # features that may absorb together

ENCODED_AT_ONCE = 1024  # samples: bounds memory
L1_PENALTY = 0.01  # for the probe that ranks features; it reads strengths divided by their rms
ITERATIONS = 100  # limit for L-BFGS; 150 change no F1 by 0.01
L1_SMOOTHING = 1e-3  # weights far below it count as 0 in the L1 penalty


class SampleOutcomes(NamedTuple):
    """What happens to a concept on each of the samples [n] that have it."""

    silent: Tensor
    """bool: none of the concept's own features fires"""
    absorbed: Tensor
    """bool (full absorption): silent, and the feature that writes most in the concept's direction
    writes at least 40 % of the projection x @ direction, with a cosine of at least 0.025"""
    fraction: Tensor
    """absorption fraction: by_others / (by_others + max(by_own, 0)). by_own is written by own
    features, by_others by up to three others of cosine >= 0.1. 0 if by_others < 40 % of projection,
    by_own >= projection or projection <= 0; else by_others is cut to at most projection - by_own"""
    absorbing: Tensor
    """int64: index of the feature that writes most in the concept's direction"""


def find_absorption(
    strengths: Tensor, x: Tensor, direction: Tensor, W_dec: Tensor, own: list[int]
) -> SampleOutcomes:
    """Find absorption on samples that have a concept.

    strengths: [n, features]; x: activations [n, d] that the SAE reconstructs; direction: [d] of
    norm 1, along which the concept lies; own: indices of the concept's own features.
    """
    cosine = cosine_similarity(W_dec, direction[None], dim=1)
    projection = x @ direction  # [n]
    written = strengths * (W_dec @ direction)  # [n, features]
    silent = (strengths[:, own] == 0).all(dim=1)
    largest, absorbing = written.max(dim=1)
    absorbed = silent & (projection > 0) & (largest >= ABSORBED_SHARE * projection)
    absorbed &= cosine[absorbing] >= ABSORBING_COSINE

    by_own = written[:, own].sum(dim=1)
    by_others = written.clamp(min=0) * (cosine >= PARTLY_ABSORBING_COSINE)
    by_others[:, own] = 0
    by_others = by_others.topk(min(MAX_ABSORBING, len(W_dec))).values.sum(dim=1)
    is_zero = (projection <= 0) | (by_own >= projection)
    is_zero |= by_others < ABSORBED_SHARE * projection
    by_others = torch.minimum(by_others, projection - by_own)
    fraction = torch.where(is_zero, 0.0, by_others / (by_others + by_own.clamp(min=0)))
    return SampleOutcomes(silent, absorbed, fraction, absorbing)


class SampleParts(NamedTuple):
    """Masks [n] (bool) of three disjoint sets of samples."""

    fit: Tensor
    """To fit probes and rank features."""
    choose: Tensor
    """To choose how many features a concept has."""
    test: Tensor
    """To count absorption on, and to score features on."""


class ConceptSamples(NamedTuple):
    """Samples with the concepts that each has, and the concepts' directions."""

    noun: str
    """What the concepts are called: letter, or parent concept."""
    concepts: list[str]
    names: list[str]
    """Names of the samples [n]."""
    source: Tensor
    """[n, d_in] activations that the SAE reads"""
    target: Tensor
    """[n, d] activations that the SAE reconstructs"""
    labels: Tensor
    """[n, concepts] bool: which concepts a sample has"""
    detected: Tensor
    """[n, concepts] bool: which concepts a probe detects in the activation; the labels if there is
    no probe"""
    directions: Tensor
    """[concepts, d] of norm 1"""
    parts: SampleParts
    probe_f1: list[float]
    """F1 of `detected` on the test part, by concept; NaN without a probe."""
    children: Tensor | None = None
    """[n, concepts] bool: whether a child of the concept (a more specific concept) is active; None
    if children are not known"""


class ConceptResult(NamedTuple):
    """Absorption and splitting of one concept. Shares are of the *counted samples*: those of the
    test part that have the concept, and in which the probe detects it. NaN if there are none."""

    concept: str
    samples: int
    """Number of counted samples."""
    probe_f1: float
    """F1 of the probe on the test part; NaN without a probe."""
    features: list[int]
    """The concept's own features, the most predictive first; more than one if it is split, empty if
    the SAE has none."""
    f1: float
    """F1 on the test part of a probe that reads the own features alone."""
    silent: float
    """Share on which no own feature fires. NaN, like the next two fields, without own features."""
    absorbed: float
    """Share on which `SampleOutcomes.absorbed` is true (full absorption)."""
    fraction: float
    """Mean of `SampleOutcomes.fraction`: share of the concept that other features write."""
    examples: list[tuple[str, int]]
    """Name of each absorbed sample, and the feature that absorbs the concept there."""
    silent_with_child: float = math.nan
    """Share of the counted samples with an active child on which the feature closest to the
    direction (own or not) is silent; NaN without such samples, or if children are not known."""
    silent_without: float = math.nan
    """The same share of the counted samples without an active child."""


class OwnFeatures(NamedTuple):
    """The own features of one concept."""

    features: list[int]
    """The most predictive first; more than one if the concept is split, empty if it has none."""
    f1: float
    """F1 on the test part of a probe that reads `features` alone; 0 if there are none."""


def find_own_features(strengths: Tensor, labels: Tensor, parts: SampleParts) -> list[OwnFeatures]:
    """Find each concept's own features, from strengths [n, features] and labels [n, concepts].

    A probe with an L1 penalty ranks the features with positive weights. The first feature is own.
    Further ones are added in order, as long as each raises the F1 of a probe on the own features by
    more than 0.03.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    # divided by their rms, so that the penalty means the same for any scale of activations
    fitted = strengths[parts.fit]
    positive = fitted[fitted > 0]
    strengths = strengths / positive.square().mean().sqrt().nan_to_num(1.0)  # NaN: all are silent
    weights, _ = fit_one_against_rest(strengths[parts.fit], labels[parts.fit], l1=L1_PENALTY)
    fit, choose, test = (strengths[part].numpy() for part in parts)
    fit_labels, choose_labels, test_labels = (labels[part].numpy() for part in parts)
    result = []
    for c, concept_weights in enumerate(weights):
        best_f1, own, test_f1 = -1.0, [], 0.0  # -1: the first feature counts whatever its F1
        count = min(MAX_OWN_FEATURES, int((concept_weights > 0).sum()))
        ranked = concept_weights.topk(count).indices.tolist()
        for k in range(1, count + 1):
            with allow_early_stopping():
                probe = LogisticRegression(class_weight="balanced", max_iter=500)
                probe.fit(fit[:, ranked[:k]], fit_labels[:, c])
            f1 = f1_score(choose_labels[:, c], probe.predict(choose[:, ranked[:k]]))
            if f1 <= best_f1 + SPLIT_GAIN:
                break
            best_f1, own = f1, ranked[:k]
            test_f1 = f1_score(test_labels[:, c], probe.predict(test[:, own]))
        result.append(OwnFeatures(own, test_f1))
    return result


@torch.no_grad()
def measure_absorption(samples: ConceptSamples, sae: SAE) -> list[ConceptResult]:
    """Count absorption and splitting of each concept in an SAE that takes raw activations."""
    encoded = [
        sae.encode(x.to(sae.W_enc.device)).cpu().to_sparse()
        for x in samples.source.split(ENCODED_AT_ONCE)
    ]
    # only features that ever fire, to save memory; if none does, the first one is kept
    fired = torch.cat([x.indices()[1] for x in encoded]).unique()
    fired = fired if len(fired) else torch.tensor([0])
    strengths = torch.cat([x.index_select(1, fired).to_dense() for x in encoded])
    W_dec = sae.W_dec.detach().cpu()[fired]
    all_own = find_own_features(strengths, samples.labels, samples.parts)
    results = []
    for c, own in enumerate(all_own):
        result = _measure_concept(samples, c, strengths, W_dec, own)
        # indices among `fired` become indices of features
        examples = [(sample, int(fired[i])) for sample, i in result.examples]
        results.append(result._replace(features=fired[result.features].tolist(), examples=examples))
    return results


def _measure_concept(
    samples: ConceptSamples, c: int, strengths: Tensor, W_dec: Tensor, own: OwnFeatures
) -> ConceptResult:
    """Count the absorption of concept c, from strengths [n, features]."""
    is_counted = samples.parts.test & samples.labels[:, c] & samples.detected[:, c]
    counted = is_counted.nonzero().squeeze(1)  # indices of samples
    strengths, direction = strengths[counted], samples.directions[c]
    outcomes = find_absorption(strengths, samples.target[counted], direction, W_dec, own.features)
    result = ConceptResult(
        concept=samples.concepts[c],
        samples=len(counted),
        probe_f1=samples.probe_f1[c],
        features=own.features,
        f1=own.f1,
        silent=math.nan,
        absorbed=math.nan,
        fraction=math.nan,
        examples=[],
    )
    if own.features:
        absorbed = outcomes.absorbed.nonzero().squeeze(1).tolist()
        result = result._replace(
            silent=outcomes.silent.float().mean().item(),
            absorbed=outcomes.absorbed.float().mean().item(),
            fraction=outcomes.fraction.mean().item(),
            examples=[(samples.names[counted[i]], int(outcomes.absorbing[i])) for i in absorbed],
        )
    if samples.children is not None:
        has_child = samples.children[counted, c]
        closest = cosine_similarity(W_dec, direction[None], dim=1).argmax()
        is_silent = (strengths[:, closest] == 0).float()
        result = result._replace(
            silent_with_child=is_silent[has_child].mean().item(),
            silent_without=is_silent[~has_child].mean().item(),
        )
    return result


def list_values(results: Sequence[ConceptResult], field: str) -> list[float]:
    """The values of a field of `ConceptResult` that are not NaN."""
    values = [getattr(result, field) for result in results]
    return [value for value in values if not math.isnan(value)]


def fit_one_against_rest(
    x: Tensor, labels: Tensor, *, l1: float = 0.0, l2: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression for each concept, on x [n, inputs] and labels [n, concepts] (bool)
    -> weights [concepts, inputs] and biases [concepts].

    The samples with the concept weigh together as much as those without it. The penalties are `l1`
    times the sum of |w|, smoothed at 0, and `l2` times the sum of w^2.
    """
    truth = labels.to(x.dtype)
    # bounded against a division by 0 where no sample, or every sample, has the concept
    share = truth.mean(dim=0).clamp(1 / len(x), 1 - 1 / len(x))
    importance = torch.where(labels, 0.5 / share, 0.5 / (1 - share))
    weights = torch.zeros(labels.shape[1], x.shape[1], requires_grad=True)
    biases = torch.zeros(labels.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def compute_loss() -> Tensor:
        solver.zero_grad()
        logits = x @ weights.T + biases
        loss = binary_cross_entropy_with_logits(logits, truth, importance, reduction="none")
        squares = weights.square()
        penalty = l1 * (squares + L1_SMOOTHING**2).sqrt().sum() + l2 * squares.sum()
        total = loss.mean(dim=0).sum() + penalty
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(compute_loss)
    return weights.detach(), biases.detach()
