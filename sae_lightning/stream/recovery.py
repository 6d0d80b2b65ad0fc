"""Measures how well an SAE's features recover the concepts behind synthetic activations.

Shapes: n = held-out samples, concepts, features, dim = width of an activation.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

COMPARED_CONCEPTS = 1024  # concepts compared with all others at a time
RECOVERED_COSINE = 0.9  # above it, a feature recovers its concept (0.9 is 26 degrees)


class Recovery(NamedTuple):
    """Features compared with concepts. They are matched one to one, so that the sum of the cosines
    of decoder rows and concepts is as large as possible.

    Precision, recall and readouts are means over the concepts that are active on at least one
    sample. A concept without a feature, or whose feature never fires, counts as 0 (but not in
    `projection_readout`).
    """

    mmcs: float
    """Mean over concepts of the largest cosine with any decoder row (Sharkey et al. 2022)."""
    recovered: float
    """Share of concepts whose matched decoder row has a cosine above 0.9."""
    precision: float
    """Of the samples on which its feature fires, the share on which the concept is active."""
    recall: float
    """Of the samples on which the concept is active, the share on which its feature fires."""
    feature_readout: float
    """Squared correlation of the strengths of the concept and its feature."""
    projection_readout: float
    """Squared correlation of the concept's strength with the activation's projection on its
    direction: a baseline, without the encoder and bias that reduce interference."""
    concept_overlap: float
    """Mean over concepts of the largest |cosine| with another; 0 if all are orthogonal."""
    encoder_agreement: float
    """Mean cosine of encoder column and decoder row of recovered features; NaN if none."""
    negative_bias: float
    """Share of recovered features that do not fire where the activation is 0: the encoder bias (for
    raw activations) is below the threshold, if any, or below 0. NaN if none are recovered."""


CONCEPT_METRICS = {"concept_overlap", "projection_readout"}
"""Fields of `Recovery` that depend on the concepts alone, not on the SAE."""


class Matching(NamedTuple):
    """Which feature is matched to which concept."""

    concepts: Tensor
    """[matched], ascending; all concepts unless there are fewer features"""
    features: Tensor
    """[matched], the feature of each of these concepts"""
    cosine: Tensor
    """[matched], between decoder row and concept"""


def compute_cosines(directions: Tensor, W_dec: Tensor) -> Tensor:
    """Compute cosines of [concepts, dim] and [features, dim] -> [concepts, features]; a row of
    zeros has cosine 0."""
    return normalize(directions, dim=1) @ normalize(W_dec, dim=1).T


def match_features(cosines: Tensor) -> Matching:
    """Find the one-to-one matching with the largest sum of `cosines` [concepts, features]; NaN
    counts as -1."""
    from scipy.optimize import linear_sum_assignment  # this import takes half a second

    cosines = cosines.nan_to_num(nan=-1.0)
    matches = linear_sum_assignment(cosines.numpy(), maximize=True)
    concepts, features = map(torch.from_numpy, matches)
    return Matching(concepts, features, cosines[concepts, features])


def measure_concept_overlap(directions: Tensor) -> float:
    """Compute the mean over concepts [concepts, dim] of the largest |cosine| with another."""
    largest = []
    for start in range(0, len(directions), COMPARED_CONCEPTS):
        part = directions[start : start + COMPARED_CONCEPTS]
        cosines = compute_cosines(part, directions).abs()
        index = torch.arange(len(part))
        cosines[index, start + index] = 0  # the cosine of each concept with itself
        largest.append(cosines.amax(dim=1))
    return torch.cat(largest).mean().item()


class Detection:
    """Float64 sums over batches of samples, from which precision, recall and readouts follow."""

    def __init__(self, matching: Matching, directions: Tensor):
        self.matching, self.directions = matching, directions
        concepts = len(directions)
        self.n = 0  # samples added so far
        # numbers of samples, by concept: where it is active, where its feature fires, and both
        self.active, self.fires, self.both = torch.zeros(3, concepts, dtype=torch.float64)
        # [3, concepts] each, for three values: strength of the concept, strength of its feature,
        # projection on its direction; `products`: times the concept's strength
        self.sums, self.squares, self.products = torch.zeros(3, 3, concepts, dtype=torch.float64)

    def add(self, x: Tensor, strengths: Tensor, features: Tensor) -> None:
        """Add samples: activations x [n, dim], strengths of the concepts [n, concepts] and of the
        features [n, features]."""
        matched = torch.zeros_like(strengths)
        matched[:, self.matching.concepts] = features[:, self.matching.features]
        self.n += len(x)
        active, fires = (strengths > 0).float(), (matched > 0).float()
        self.active += active.sum(dim=0)
        self.fires += fires.sum(dim=0)
        self.both += (active * fires).sum(dim=0)
        for i, values in enumerate((strengths, matched, x @ self.directions.T)):
            self.sums[i] += values.sum(dim=0)
            self.squares[i] += values.square().sum(dim=0)
            self.products[i] += (values * strengths).sum(dim=0)

    def result(self) -> dict[str, float]:
        """Compute the fields of `Recovery` that depend on samples."""
        occurs = self.active > 0  # on at least one sample
        variance = self.squares - self.sums.square() / self.n  # [3, concepts], times n
        covariance = self.products - self.sums * self.sums[0] / self.n
        squared_correlation = _divide(covariance.square(), variance * variance[0])
        by_concept = {
            "precision": _divide(self.both, self.fires),
            "recall": _divide(self.both, self.active),
            "feature_readout": squared_correlation[1],
            "projection_readout": squared_correlation[2],
        }
        return {name: values[occurs].mean().item() for name, values in by_concept.items()}


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, but 0 where b is 0 up to rounding."""
    return torch.where(b > 1e-12, a / b, 0.0)


def measure_recovery(
    directions: Tensor,
    weights: dict[str, Tensor],
    samples: Iterable[tuple[Tensor, Tensor, Tensor]],
) -> Recovery:
    """Compare an SAE with the concepts' directions [concepts, dim]. `weights`: the SAE's, for raw
    activations (see `SAE.fold`). `samples` yields activations [n, dim], and strengths [n, concepts]
    of the concepts and [n, features] of the features, on the CPU."""
    W_dec = weights["W_dec"]
    cosines = compute_cosines(directions, W_dec)
    matching = match_features(cosines)
    detection = Detection(matching, directions)
    for batch in samples:
        detection.add(*batch)
    recovered = matching.features[matching.cosine > RECOVERED_COSINE]
    agreement = torch.cosine_similarity(weights["W_enc"].T[recovered], W_dec[recovered], dim=1)
    bias = weights["b_enc"] - weights.get("threshold", torch.zeros(()))
    return Recovery(
        mmcs=cosines.amax(dim=1).mean().item(),
        recovered=len(recovered) / len(directions),
        concept_overlap=measure_concept_overlap(directions),
        encoder_agreement=agreement.mean().item(),
        negative_bias=(bias[recovered] < 0).float().mean().item(),
        **detection.result(),
    )
