"""Gated: one path decides whether a feature fires, the other how strongly."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from sae_lightning.sae.base import SAE, Forward, SAEConfig
from sae_lightning.sae.losses import l1, mse
from sae_lightning.sae.matrix import Matrix
from sae_lightning.sae.objective import Moment, PenaltyLoss, RowNorms


@dataclass(slots=True, kw_only=True)
class GatedConfig(SAEConfig):
    """A network with two encoders that share their directions."""

    start_bias: float = 0.0
    """Encoder biases at the start."""
    fixed_norm: bool = True
    """Keep every decoder row at that norm. With false the penalty, which only sees the gate, can be
    evaded: rows shrink while r_mag grows."""


class Gated(SAE):
    """f = 1[gate > 0] relu(x W_enc exp(r_mag) + b_mag), gate = x W_enc + b_gate;
    x_hat = f W_dec + b_dec.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv
    2404.16014). The penalty acts on the gate alone and does not shrink strengths. b_gate is `b_enc`
    here, as in every SAE the bias that decides whether a feature fires.
    """

    architecture = "gated"
    bytes_per_activation = 34
    per_feature = SAE.per_feature | {"r_mag": 0, "b_mag": 0}
    biases = ("b_enc", "b_mag")

    def __init__(self, config: GatedConfig, d_in: int, d_out: int, generator: Generator):
        super().__init__(config, d_in, d_out, generator)
        self.r_mag = nn.Parameter(torch.zeros(config.features))
        self.b_mag = nn.Parameter(torch.zeros(config.features))

    def strengths(self, pre: Matrix) -> Tensor:
        """Feature strengths of the gate's pre-activations."""
        strength = (pre.values - pre.of(self.b_enc)) * pre.of(self.r_mag.exp()) + pre.of(self.b_mag)
        return strength.relu() * (pre.values > 0)

    def training_pass(self, x: Tensor, only_active: bool = False) -> Forward:
        """Reconstruct a batch [batch, d_in]; two terms of the objective share the gate."""
        this = super().training_pass(x, only_active)
        return this._replace(gate=this.pre.replace(this.pre.values.relu()))

    def biases_without(self, share: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        b_mag = weights["b_mag"] - share * weights["r_mag"].exp()
        return super().biases_without(share, weights) | {"b_mag": b_mag}

    @torch.no_grad()
    def restart(self, which: Tensor, columns: Tensor, rows: Tensor) -> None:
        super().restart(which, columns, rows)
        self.r_mag[which] = 0
        self.b_mag[which] = 0


@dataclass(slots=True, kw_only=True)
class GatedLoss(PenaltyLoss):
    """loss = mse + l1 x sum_i relu(gate_i) |W_dec_i| + mse(relu(gate) W_dec + b_dec).

    The decoder of the last term is detached: it teaches the gate, and the gate alone.
    """

    sparsity = "l1"

    l1: float = 1e-3
    """Sparsity coefficient."""

    def penalty(self, sae: Gated, this: Forward, moment: Moment) -> Tensor:
        """How far the gates are open, in units of decoder norm."""
        return this.gate.penalty(l1, RowNorms.apply(sae.W_dec.detach()))

    def terms(self, sae: Gated, this: Forward, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        """The usual ones, and what teaches the gate, through which no gradient of the mse flows."""
        terms = PenaltyLoss.terms(self, sae, this, target, moment)
        # the difference alone, since b_dec and a skip connection are in the reconstruction already
        more = this.gate.replace(this.gate.values - this.features.values.detach())
        difference = more @ sae.W_dec.detach()
        terms["gate"] = mse(this.reconstruction.detach() + difference, target)
        return terms

    def coefficients(self) -> dict[str, float]:
        # the gate's error counts as much as the reconstruction's
        return PenaltyLoss.coefficients(self) | {"gate": 1.0}
