"""Superposition with known concepts: activations whose sparse causes are given.

Shapes: n = samples, concepts, dim = length of an activation (fewer than concepts).
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

MAX_RATE = 0.5  # firing probability; what is active more often is better described by its absence
GROUP_CONCEPTS = 8  # concepts that tend to fire together
LOG_STRENGTH_STD = 0.5  # one standard deviation is a factor of 1.65


class World(NamedTuple):
    """x = sum of s_i d_i over the active concepts i, with strength s_i > 0 and direction |d_i| = 1.

    Concepts are linear directions in superposition (Elhage et al. 2022, "Toy Models of
    Superposition"): random ones, because many more of them than dimensions are nearly orthogonal.
    1,024 in 256 dimensions have a cosine of 0.21 with their nearest neighbour (mean), as good as a
    union of random orthonormal bases (also 0.21).
    """

    directions: Tensor
    """[concepts, dim], of norm 1"""
    rates: Tensor
    """[concepts], the probability that a concept is active, descending (Zipf's law)"""
    parent: Tensor
    """[concepts], the concept without which this one is never active; itself for most"""
    group: Tensor
    """[concepts], number of the group with which a concept tends to fire"""
    correlation: float
    """Of the latent normals of two concepts of a group."""

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Activations [n, dim] and the strengths [n, concepts] that they are made of; 0: not
        active. Strengths are log-normal about 1."""
        active = self._active(n, generator)
        strengths = torch.zeros(active.shape)
        normal = torch.randn(int(active.sum()), generator=generator)
        strengths[active] = torch.exp(LOG_STRENGTH_STD * normal)
        return strengths @ self.directions, strengths

    def _active(self, n: int, generator: Generator) -> Tensor:
        """Which concepts fire: [n, concepts] bool.

        A one-factor Gaussian copula: concept i fires where sqrt(r) g + sqrt(1 - r) e_i, with g
        common to its group, is below the quantile of its rate. So correlation changes no rate.
        A child fires at rate / (its parent's rate) where its parent does, else independently.
        """
        parents = self.parent == torch.arange(len(self.rates))
        given = torch.where(parents, self.rates, self.rates / self.rates[self.parent])
        latent = torch.randn(n, len(self.rates), generator=generator)
        if self.correlation > 0:
            common = torch.randn(n, int(self.group.max()) + 1, generator=generator)[:, self.group]
            share = self.correlation * parents
            latent = share.sqrt() * common + (1 - share).sqrt() * latent
        drawn = latent < torch.special.ndtri(given)
        return drawn & drawn[:, self.parent]


def make_world(
    *,
    concepts: int,
    dim: int,
    l0: float,
    zipf: float = 1.0,
    correlation: float = 0.0,
    hierarchy: float = 0.0,
    seed: int = 0,
) -> World:
    """A world with `l0` active concepts per sample; a share `hierarchy` of them, the rarest, are
    children of the most frequent."""
    generator = Generator().manual_seed(seed)
    directions = torch.randn(concepts, dim, generator=generator)
    number = torch.arange(concepts)
    parents = concepts - int(hierarchy * concepts)
    return World(
        directions=directions / directions.norm(dim=1, keepdim=True),
        rates=make_zipf_rates(concepts, l0, zipf),
        parent=torch.where(number < parents, number, (number - parents) % parents),
        # each group has frequent and rare concepts
        group=number % math.ceil(parents / GROUP_CONCEPTS),
        correlation=correlation,
    )


def make_zipf_rates(concepts: int, l0: float, exponent: float) -> Tensor:
    """Firing probabilities min(MAX_RATE, c / rank^exponent) [concepts], with c such that they add
    up to `l0`."""
    law = torch.arange(1, concepts + 1, dtype=torch.float64) ** -exponent
    # the first m at MAX_RATE leave l0 - m MAX_RATE for the others, whose law adds up to the tail
    capped = torch.arange(concepts)
    tail = law.flip(0).cumsum(0).flip(0)
    c = (l0 - MAX_RATE * capped) / tail
    m = int((c * law <= MAX_RATE).nonzero()[0])
    return torch.where(capped < m, MAX_RATE, c[m] * law).float()
