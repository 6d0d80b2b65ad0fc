"""Metrics of an SAE on a set of activations.

Numerators and denominators are summed over the whole set and divided once at the end. Averaging
ratios over batches or tokens gives another number, and made published explained variances too high
(SAELens issue 659). The classes below sum in float64.

Shapes: n = tokens, d = width of the site.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.scoring.dominance import DominantDimension, find_dominant_dimension


def compute_explained_variance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """1 - sum |x - x_hat|^2 / sum |x - mean|^2 over one set [n, d]; the mean predictor scores 0."""
    target, reconstruction = target.float(), reconstruction.float()
    residual = (target - reconstruction).square().sum()
    return 1 - residual / (target - target.mean(dim=0)).square().sum()


class Quality(NamedTuple):
    """How well an SAE reconstructs a set of activations, and how sparsely."""

    l0: float
    """Mean number of active features per token."""
    explained_variance: float
    """1 - sum |x - x_hat|^2 / sum |x - mean|^2; NaN where activations are constant."""
    unfired: float
    """Share of features that never fire."""
    density: Tensor
    """[features] share of tokens on which each feature fires"""
    dimension: DominantDimension | None
    """The dimension that dominates the variance, if one does."""


class QualitySums:
    """Sums over batches, from which `Quality` is computed."""

    def __init__(self):
        self.tokens = 0
        self.residual = self.total = 0.0  # sum |x - x_hat|^2, sum |x - shift|^2
        self.residual_by_dim = self.total_by_dim = torch.zeros(())  # both for each dimension
        self.shift = self.sum = torch.zeros(())  # first batch's mean, sum of x - shift
        self.firing_counts = torch.zeros(())

    @torch.no_grad()
    def add(self, target: Tensor, reconstruction: Tensor, features: Tensor) -> None:
        """Add tokens: [n, d], [n, d] and [n, features]."""
        # on the CPU: not every accelerator has float64
        target, reconstruction = target.cpu().double(), reconstruction.cpu().double()
        if self.tokens == 0:
            self.shift = target.mean(dim=0)  # subtracting it avoids cancellation in the variance
        self.tokens += len(target)
        error, square = (target - reconstruction).square(), (target - self.shift).square()
        self.residual += error.sum().item()
        self.total += square.sum().item()
        self.residual_by_dim = self.residual_by_dim + error.sum(dim=0)
        self.total_by_dim = self.total_by_dim + square.sum(dim=0)
        self.sum = self.sum + (target - self.shift).sum(dim=0)
        self.firing_counts = self.firing_counts + (features > 0).sum(dim=0).cpu()

    def result(self, join: Callable[[Tensor], Tensor] = lambda counts: counts) -> Quality:
        """Quality over all tokens added so far. `join`: where features are split over ranks, turns
        this rank's counts into those of all features."""
        total = self.total - self.sum.square().sum().item() / self.tokens
        counts = join(self.firing_counts).double()
        return Quality(
            l0=counts.sum().item() / self.tokens,
            explained_variance=1 - self.residual / total if total > 0 else float("nan"),
            unfired=(counts == 0).double().mean().item(),
            density=counts / self.tokens,
            dimension=find_dominant_dimension(
                self.residual_by_dim, self.total_by_dim - self.sum.square() / self.tokens
            ),
        )


class Fidelity(NamedTuple):
    """Error of a reconstruction x_hat of x: its size, and how far direction and length are off.

    Centred numbers are computed from x - m and x_hat - m, where m is the mean of x: if the mean is
    large, the uncentred numbers are close to 1 for any SAE.
    """

    mse: float
    """Mean squared error per element, in the activations' own units."""
    relative_mse: float
    """sum |x - x_hat|^2 / sum |x|^2"""
    cosine: float
    """Mean over tokens of the cosine of x and x_hat."""
    cosine_centred: float
    norm_ratio: float
    """sum |x_hat| / sum |x|"""
    gamma: float
    """Relative reconstruction bias, sum |x_hat|^2 / sum x . x_hat: x_hat / gamma is nearest to x
    (Rajamanoharan et al. 2024, 2404.16014). Below 1 where features are too weak (shrinkage)."""
    gamma_centred: float


class FidelitySums:
    """Sums over batches, from which `Fidelity` is computed."""

    def __init__(self, mean: Tensor):
        """`mean` [d]: the mean of the whole set."""
        self.mean = mean.cpu().double()
        self.tokens = 0
        self.residual = 0.0
        self.reconstruction = torch.zeros_like(self.mean)  # sum over tokens [d]
        # the six numbers of `_sum_over_tokens`, without and with the mean subtracted
        self.uncentred = self.centred = torch.zeros(6, dtype=torch.float64)

    @torch.no_grad()
    def add(self, target: Tensor, reconstruction: Tensor) -> None:
        """Add tokens: [n, d] each."""
        x, x_hat = target.cpu().double(), reconstruction.cpu().double()
        self.tokens += len(x)
        self.residual += (x - x_hat).square().sum().item()
        self.reconstruction += x_hat.sum(dim=0)
        self.uncentred = self.uncentred + _sum_over_tokens(x, x_hat)
        self.centred = self.centred + _sum_over_tokens(x - self.mean, x_hat - self.mean)

    @property
    def mean_reconstruction(self) -> Tensor:
        """Mean of x_hat over all tokens added so far [d]."""
        return self.reconstruction / self.tokens

    def result(self) -> Fidelity:
        """Fidelity over all tokens added so far. Where the denominator of a ratio is 0, the ratio
        is NaN if the numerator is 0 too, else infinite."""
        norm, norm_hat, square, square_hat, product, cosine = self.uncentred
        *_, centred_square_hat, centred_product, centred_cosine = self.centred
        return Fidelity(
            mse=self.residual / (self.tokens * len(self.mean)),
            relative_mse=(self.residual / square).item(),
            cosine=(cosine / self.tokens).item(),
            cosine_centred=(centred_cosine / self.tokens).item(),
            norm_ratio=(norm_hat / norm).item(),
            gamma=(square_hat / product).item(),
            gamma_centred=(centred_square_hat / centred_product).item(),
        )


def _sum_over_tokens(x: Tensor, x_hat: Tensor) -> Tensor:
    """Sums over tokens [n, d] of |x|, |x_hat|, their squares, x . x_hat and the cosine (0 where a
    vector is 0)."""
    norm, norm_hat, product = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(dim=1)
    cosine = (product / (norm * norm_hat)).nan_to_num(nan=0.0)
    values = norm, norm_hat, norm.square(), norm_hat.square(), product, cosine
    return torch.stack([value.sum() for value in values])


def count_by_density(density: Tensor) -> dict[str, int]:
    """Count features by density [features], the share of tokens on which each fires, in bins of a
    power of ten.

    {"never": 12, "1e-06": 0, ..., "1e-04": 3, ...}: 3 features fire on a share from 1e-4 to 1e-3.
    The lowest bin also counts smaller shares.
    """
    # rounded, or a share of exactly 0.001 would fall below 1e-3
    exponents = density[density > 0].double().log10().round(decimals=6).floor().clamp(min=-6)
    counts = {"never": int((density == 0).sum())}
    for exponent in range(-6, 1):
        name = f"1e{exponent:03d}" if exponent else "1"
        counts[name] = int((exponents == exponent).sum())
    return counts
