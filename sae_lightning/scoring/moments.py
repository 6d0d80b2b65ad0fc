"""Mean, covariance and principal directions of activations.

Shapes: n = tokens, d = width of a site.
"""

import torch
from torch import Tensor


class Moments:
    """Sums over tokens (float64), from which mean and covariance are computed."""

    def __init__(self):
        self.tokens = 0
        self.shift = self.sum = self.products = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the activations x [n, d] of n tokens."""
        # not every accelerator has float64
        x = x.cpu().double() if x.device.type == "mps" else x.double()
        if self.shift is None:
            # subtracting a first estimate of the mean avoids cancellation in the covariance
            self.shift = x.mean(dim=0)
            self.sum = torch.zeros_like(self.shift)
            self.products = torch.zeros_like(self.shift.outer(self.shift))
        x = x - self.shift
        self.tokens += len(x)
        self.sum += x.sum(dim=0)
        self.products.addmm_(x.T, x)

    @property
    def mean(self) -> Tensor:
        """[d] float64, on the CPU"""
        return (self.shift + self.sum / self.tokens).cpu()

    @property
    def covariance(self) -> Tensor:
        """[d, d] float64, on the CPU"""
        mean = self.sum / self.tokens
        return (self.products / self.tokens - mean.outer(mean)).cpu()

    def find_principal_directions(self) -> tuple[Tensor, Tensor]:
        """Variances [d] and directions (rows of [d, d]), the largest variance first."""
        variances, columns = torch.linalg.eigh(self.covariance)
        return variances.flip(0).clamp(min=0), columns.T.flip(0)
