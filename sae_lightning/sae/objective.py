"""Base classes of training objectives: their terms, the coefficients, and which term makes features
sparse."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.sae import losses
from sae_lightning.sae.base import SAE, TrainingOutput

KL_FROM, KL_LR = 0.9, 0.1  # defaults of loss.kl_from and loss.kl_lr


class TrainingStatus(NamedTuple):
    """The state of the run that an objective may depend on."""

    dead: Tensor
    """[features] bool: which features of this rank have not fired for `callbacks.dead_after`
    tokens"""
    progress: Tensor
    """Share of the run that is done, from 0 to 1"""


@dataclass(slots=True, kw_only=True)
class Loss:
    """loss = mse + sum of coefficient * term.

    With `kl`, (mse + kl * KL * mse' / KL') / (1 + kl) replaces the mse in the last part of the run.
    KL is the divergence between the LLM's predictions without and with the SAE in place; mse' and
    KL' are mse and KL without gradients. The result is as large as the mse, so that the other
    coefficients keep their meaning (Karvonen 2025, arXiv 2503.17272, with kl = 1)."""

    sparsity = None
    """Name of the term that makes features sparse: `warmup` and `target_l0` act on its
    coefficient."""

    kl: float = 0.0
    """Weight, relative to the mse, of the KL divergence between the LLM's predictions without and
    with the SAE in place, in the last part of the run; 0 is off, Karvonen 2025 uses 1."""
    kl_from: float = KL_FROM
    """Share of the run after which `kl` takes effect."""
    kl_lr: float = KL_LR
    """Factor by which the learning rate is multiplied from then on: the KL's gradient is larger and
    noisier than that of the mse, and at the full rate it makes both worse (docs/kl.md)."""

    def __post_init__(self):
        _check_not_negative("kl", self.kl, "1")
        if not 0 <= self.kl_from < 1:
            raise UserError(
                f"loss.kl_from={self.kl_from}: give a share of the run, from 0 to below 1"
            )
        if not 0 < self.kl_lr < math.inf:
            raise UserError(f"loss.kl_lr={self.kl_lr}: give a positive factor, such as 0.1")
        for name, default in (("kl_from", KL_FROM), ("kl_lr", KL_LR)):
            if not self.kl and getattr(self, name) != default:
                raise UserError(
                    f"loss.{name}={getattr(self, name)} has no effect with loss.kl=0: leave it "
                    "out, or give loss.kl=1"
                )

    def terms(
        self, sae: SAE, output: TrainingOutput, target: Tensor, status: TrainingStatus
    ) -> dict[str, Tensor]:
        """The unweighted terms [] by name, always including "mse"."""
        return {"mse": losses.mse(output.reconstruction, target)}

    def coefficients(self) -> dict[str, float]:
        """Coefficient of each term but the mse, after warm-up."""
        return {}

    @property
    def fixes_coefficient(self) -> bool:
        """Whether a fixed coefficient determines the L0, rather than a target or k."""
        has_target = getattr(self, "target_l0", None) is not None
        return bool(self.coefficients().get(self.sparsity)) and not has_target


class RowNorms(torch.autograd.Function):
    """[n]: norms of rows [n, d], with a backward pass that reads the rows only once."""

    @staticmethod
    def forward(ctx, rows: Tensor):
        norms = rows.norm(dim=1)
        ctx.save_for_backward(rows, norms)
        return norms

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, norms = ctx.saved_tensors
        # a row of zeros gets a gradient of 0, not NaN
        return (gradient / norms.clamp_min(torch.finfo(norms.dtype).tiny))[:, None] * rows


def _check_not_negative(name: str, value: float, example: str) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"loss.{name}={value}: give a number that is 0 or more, such as {example}")


@dataclass(slots=True, kw_only=True)
class PenaltyLoss(Loss):
    """loss = mse + coefficient * penalty + preact * (distance of dead features to thresholds):
    for architectures whose features do not compete."""

    warmup: float = 0.05
    """Share of the run over which the coefficient rises linearly from 0."""
    target_l0: float | None = None
    """Target number of active features per token: the coefficient starts at its given value and is
    adjusted towards this target; null leaves it fixed."""
    preact: float = 0.0
    """Coefficient of the pre-activation loss, which pulls dead features back to their threshold; 0
    is off. Anthropic uses 3e-6 (with a squared error summed over the site's dimensions). The value
    hardly matters: only dead features get this gradient, and Adam normalises it."""

    def __post_init__(self):
        Loss.__post_init__(self)
        _check_not_negative("preact", self.preact, "3e-6")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"loss.warmup={self.warmup}: give a share of the run, from 0 to 1")
        if self.target_l0 is not None and not 0 < self.target_l0 < math.inf:
            raise UserError(
                f"loss.target_l0={self.target_l0}: give a positive number of active features per "
                "token, or null"
            )
        if self.target_l0 is not None and self.warmup > 0.5:
            raise UserError(
                f"loss.warmup={self.warmup}: loss.target_l0={self.target_l0} takes effect once "
                "the warm-up is over; give at most 0.5"
            )
        coefficient = getattr(self, self.sparsity)
        _check_not_negative(self.sparsity, coefficient, "1e-3")
        if self.target_l0 is not None and coefficient == 0:
            raise UserError(
                f"loss.{self.sparsity}=0: loss.target_l0={self.target_l0} multiplies it, so it "
                "must start above 0; leave it out"
            )

    def penalty(self, sae: SAE, output: TrainingOutput, status: TrainingStatus) -> Tensor:
        """The term named by `sparsity`, unweighted [], summed over this rank's features."""
        raise NotImplementedError

    def terms(
        self, sae: SAE, output: TrainingOutput, target: Tensor, status: TrainingStatus
    ) -> dict[str, Tensor]:
        """The mse, the penalty and, if it is on, the pre-activation loss."""
        terms = Loss.terms(self, sae, output, target, status)
        terms[self.sparsity] = sae.split.ranks.sum(self.penalty(sae, output, status))
        if self.preact:
            dead = status.dead.nonzero().squeeze(1)
            pre, norms = sae.pre_activations_of(dead, output), sae.W_dec[dead].norm(dim=1)
            own_term = losses.preact(pre, sae.thresholds_for(dead), norms)
            terms["preact"] = sae.split.ranks.sum(own_term)
        return terms

    def coefficients(self) -> dict[str, float]:
        coefficients = {self.sparsity: getattr(self, self.sparsity)}
        return coefficients | {"preact": self.preact} if self.preact else coefficients


@dataclass(slots=True, kw_only=True)
class AuxKLoss(Loss):
    """loss = mse + auxk * AuxK, where dead features reconstruct the residual: for architectures
    whose features compete for k places, so that dead ones have positive pre-activations, too."""

    auxk: float = 1 / 32
    """Coefficient of AuxK, by which dead features learn to reconstruct the residual; 0 is off (Gao
    et al. 2024: 1/32)."""
    auxk_k: int | None = None
    """Dead features used on each token; null for half the width of the target site."""

    def __post_init__(self):
        Loss.__post_init__(self)
        _check_not_negative("auxk", self.auxk, "0.03125")
        if self.auxk_k is not None and self.auxk_k < 1:
            raise UserError(f"loss.auxk_k={self.auxk_k}: give at least 1 feature, or null")
        if self.auxk_k is not None and self.auxk == 0:
            raise UserError(
                f"loss.auxk_k={self.auxk_k} has no effect with loss.auxk=0: leave it out, or give "
                "loss.auxk"
            )

    def terms(
        self, sae: SAE, output: TrainingOutput, target: Tensor, status: TrainingStatus
    ) -> dict[str, Tensor]:
        """The mse and, if it is on, AuxK."""
        terms = Loss.terms(self, sae, output, target, status)
        if self.auxk:
            k = self.auxk_k or max(1, target.shape[1] // 2)
            residual = target - output.reconstruction
            dead = status.dead.nonzero().squeeze(1)
            pre = sae.pre_activations_of(dead, output)
            terms["auxk"] = losses.auxk(residual, pre, sae.W_dec[dead], k, sae.split.ranks)
        return terms

    def coefficients(self) -> dict[str, float]:
        return {"auxk": self.auxk} if self.auxk else {}
