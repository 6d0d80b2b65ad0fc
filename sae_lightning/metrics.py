"""Metrics: what is known about an SAE after it has seen some activations.

Everything is summed in float64 over the whole set and divided once at the end. Averages of
per-batch or per-token ratios are not the same number: they gave published explained variances
that were too high (SAELens issue 659).
"""

from typing import NamedTuple

import torch
from torch import Tensor


def explained_variance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """1 - sum |x - x_hat|^2 / sum |x - mean|^2 over one set [n, d]; the mean predictor scores 0."""
    target, reconstruction = target.float(), reconstruction.float()
    residual = (target - reconstruction).square().sum()
    return 1 - residual / (target - target.mean(dim=0)).square().sum()


class Quality(NamedTuple):
    """How well an SAE reconstructs a set of activations, and how sparsely."""

    l0: float
    """Mean number of active features per token."""
    explained_variance: float
    """1 - residual sum of squares / total sum of squares about the set's mean; nan where the
    activations are constant."""
    unfired: float
    """Share of features that fire on none of the tokens."""
    density: Tensor
    """[features] share of tokens on which each feature fires"""


class QualitySums:
    """Sums over batches from which `Quality` follows."""

    def __init__(self):
        self.tokens = 0
        self.residual = self.total = 0.0
        self.shift = self.sum = self.fired = torch.zeros(())

    @torch.no_grad()
    def add(self, target: Tensor, reconstruction: Tensor, features: Tensor) -> None:
        """Add tokens: [n, d], [n, d] and [n, features]."""
        # in float64 on the CPU: not every accelerator has it
        target, reconstruction = target.cpu().double(), reconstruction.cpu().double()
        if self.tokens == 0:
            # Sums about a first guess of the mean: the subtraction below then loses no digits
            # where activations sit far from the origin.
            self.shift = target.mean(dim=0)
        self.tokens += len(target)
        self.residual += (target - reconstruction).square().sum().item()
        self.total += (target - self.shift).square().sum().item()
        self.sum = self.sum + (target - self.shift).sum(dim=0)
        self.fired = self.fired + (features > 0).sum(dim=0).cpu()

    def result(self) -> Quality:
        """The metrics of all tokens added so far."""
        total = self.total - self.sum.square().sum().item() / self.tokens
        fired = self.fired.double()
        return Quality(
            l0=fired.sum().item() / self.tokens,
            explained_variance=1 - self.residual / total if total > 0 else float("nan"),
            unfired=(fired == 0).double().mean().item(),
            density=fired / self.tokens,
        )


def density_histogram(density: Tensor) -> dict[str, int]:
    """How many features [features] fire on which share of tokens, by power of ten.

    {"never": 12, "1e-05": 0, "1e-04": 3, ...}: 3 features fire on 1e-4 to 1e-3 of the tokens.
    """
    # rounded, or a share of exactly 0.001 would fall below 1e-3
    exponents = torch.log10(density[density > 0].double()).mul(1e6).round().div(1e6).floor()
    counts = {"never": int((density == 0).sum())}
    for exponent in range(-6, 1):
        lowest, highest = exponent == -6, exponent == 0
        inside = exponents <= exponent if lowest else exponents == exponent
        counts["1" if highest else f"1e{exponent:03d}"] = int(inside.sum())
    return counts
