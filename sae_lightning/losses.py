"""Training objectives: pure functions of tensors, and the coefficients that weigh them.

Shapes: batch = tokens, d = width of the target site.
Units: activations are normalised to a mean square of 1 per element, so an mse of 1 is the error
of predicting the mean, whatever the model or the layer.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.sae.base import SAE, Output


def mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over [batch, d]."""
    return (reconstruction.float() - target).square().mean()


def l1(features: Tensor, W_dec: Tensor) -> Tensor:
    """Mean over the batch of sum_i f_i |W_dec_i|_2, for [batch, features] and [features, d].

    The decoder norm keeps the optimiser from shrinking f and growing W_dec instead
    (Conerly et al., Anthropic April 2024 update).
    """
    # mean over the batch first: a [batch, features] product would be made only to be added up.
    # Not `@`, which autocast would compute in bf16.
    return (features.float().mean(dim=0) * W_dec.norm(dim=1)).sum()


@dataclass(slots=True, kw_only=True)
class Loss:
    """loss = mse + sum of coefficient x penalty; each penalty is warmed up from 0."""

    def terms(self, sae: SAE, output: Output, target: Tensor) -> dict[str, Tensor]:
        """The unweighted terms by name; "mse" is always there."""
        return {"mse": mse(output.reconstruction, target)}

    def coefficients(self) -> dict[str, float]:
        """Coefficient of each term but the mse, after warm-up."""
        return {}

    @property
    def penalty_warmup(self) -> float:
        """Share of the run over which the coefficients rise from 0 to their value."""
        return 0.0


@dataclass(slots=True, kw_only=True)
class DenseLoss(Loss):
    """loss = mse: an ordinary autoencoder."""


@dataclass(slots=True, kw_only=True)
class ReLULoss(Loss):
    """loss = mse + l1 x mean over the batch of sum_i f_i |W_dec_i|."""

    l1: float = 1e-3
    """Sparsity coefficient; 1e-4 is dense, 1e-2 very sparse. Anthropic's lambda is l1 x d."""
    warmup: float = 0.05
    """Share of the run over which l1 rises linearly from 0."""

    def __post_init__(self):
        if not 0 <= self.l1 < math.inf:
            raise UserError(f"loss.l1={self.l1}: give a number that is 0 or more, such as 1e-3")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"loss.warmup={self.warmup}: give a share of the run, from 0 to 1")

    def terms(self, sae: SAE, output: Output, target: Tensor) -> dict[str, Tensor]:
        """The mse and the sum of feature strengths, in units of decoder norm."""
        return {
            "mse": mse(output.reconstruction, target),
            "l1": l1(output.features, sae.W_dec),
        }

    def coefficients(self) -> dict[str, float]:
        """l1, after warm-up."""
        return {"l1": self.l1}

    @property
    def penalty_warmup(self) -> float:
        """Share of the run over which l1 rises."""
        return self.warmup


LOSSES: dict[str, type[Loss]] = {"relu": ReLULoss, "dense": DenseLoss}
"""The objective of each architecture (the keys of `ARCHITECTURES`)."""
