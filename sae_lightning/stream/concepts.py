"""Superposition with known concepts: activations are sparse sums of the concepts' directions.

Shapes: n = samples, concepts, dim = length of an activation (usually less than concepts).
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

MAX_RATE = 0.5  # firing probability; a concept active more often than not is hardly sparse
GROUP_CONCEPTS = 8  # concepts that tend to fire together
LOG_STRENGTH_STD = 0.5  # one standard deviation is a factor of 1.65


class ConceptWorld(NamedTuple):
    """x = sum of s_i * d_i over the active concepts i, with strength s_i > 0 and |d_i| = 1.

    Concepts are linear directions in superposition (Elhage et al. 2022, "Toy Models of
    Superposition"). They are random, since many more random directions than dimensions are nearly
    orthogonal: of 1,024 in 256 dimensions, the mean |cosine| with the nearest one is 0.21.
    """

    directions: Tensor
    """[concepts, dim], of norm 1"""
    rates: Tensor
    """[concepts], the probability that a concept is active, descending (Zipf's law)"""
    parent: Tensor
    """[concepts], index of the parent, without which a concept is never active; a concept that is
    no child is its own parent"""
    group: Tensor
    """[concepts], index of a concept's group, whose concepts tend to fire together"""
    correlation: float
    """r in `_draw_active`: how much the concepts of a group, except children, fire together."""

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Sample activations [n, dim] and the strengths [n, concepts] of their concepts: log-normal
        with median 1, or 0 where a concept is not active."""
        active = self._draw_active(n, generator)
        strengths = torch.zeros(active.shape)
        normal = torch.randn(int(active.sum()), generator=generator)
        strengths[active] = torch.exp(LOG_STRENGTH_STD * normal)
        return strengths @ self.directions, strengths

    def _draw_active(self, n: int, generator: Generator) -> Tensor:
        """Draw which concepts are active -> [n, concepts] bool.

        A one-factor Gaussian copula: concept i is active where sqrt(r) * g + sqrt(1 - r) * e_i is
        below the quantile of its rate. Here r is `correlation`, but 0 for a child; g (one for each
        group) and e_i are standard normal. So correlation changes no rate. Where its parent is
        active, a child is active with probability rate / (its parent's rate), elsewhere never.
        """
        is_child = self.parent != torch.arange(len(self.rates))
        conditional = torch.where(is_child, self.rates / self.rates[self.parent], self.rates)
        latent = torch.randn(n, len(self.rates), generator=generator)
        if self.correlation > 0:
            common = torch.randn(n, int(self.group.max()) + 1, generator=generator)[:, self.group]
            r = torch.where(is_child, 0.0, self.correlation)
            latent = r.sqrt() * common + (1 - r).sqrt() * latent
        active = latent < torch.special.ndtri(conditional)
        return active & active[:, self.parent]


def make_concept_world(
    *,
    concepts: int,
    dim: int,
    l0: float,
    zipf: float = 1.0,
    correlation: float = 0.0,
    hierarchy: float = 0.0,
    seed: int = 0,
) -> ConceptWorld:
    """Make a world with a mean of `l0` active concepts per sample. The rarest concepts, a share
    `hierarchy` of all, are children of the others."""
    generator = Generator().manual_seed(seed)
    directions = torch.randn(concepts, dim, generator=generator)
    index = torch.arange(concepts)
    parent_count = concepts - int(hierarchy * concepts)
    return ConceptWorld(
        directions=directions / directions.norm(dim=1, keepdim=True),
        rates=make_zipf_rates(concepts, l0, zipf),
        parent=torch.where(index < parent_count, index, (index - parent_count) % parent_count),
        # each group has frequent and rare concepts
        group=index % math.ceil(parent_count / GROUP_CONCEPTS),
        correlation=correlation,
    )


def make_zipf_rates(concepts: int, l0: float, exponent: float) -> Tensor:
    """Compute firing probabilities min(MAX_RATE, c * n^-exponent) of the concepts n = 1, 2, ...
    [concepts], with c such that they add up to `l0`."""
    power = torch.arange(1, concepts + 1, dtype=torch.float64) ** -exponent
    # if the first m concepts are at MAX_RATE, the others share l0 - m * MAX_RATE = c[m] * tail[m]
    m = torch.arange(concepts)
    tail = power.flip(0).cumsum(0).flip(0)  # sum over all concepts but the first m
    c = (l0 - MAX_RATE * m) / tail
    at_limit = int((c * power <= MAX_RATE).nonzero()[0])  # smallest m with no other above MAX_RATE
    return torch.where(m < at_limit, MAX_RATE, c[at_limit] * power).float()
