"""Gated: one path decides whether a feature fires, the other how strongly."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_lightning.sae import losses
from sae_lightning.sae.base import SAE, SAEConfig, TrainingOutput
from sae_lightning.sae.matrix import Matrix
from sae_lightning.sae.objective import PenaltyLoss, RowNorms, TrainingStatus


@dataclass(slots=True, kw_only=True)
class GatedConfig(SAEConfig):
    """An SAE with two encoders that share their directions."""

    start_bias: float = 0.0
    """Encoder biases at the start, in standard deviations of a pre-activation."""
    fixed_norm: bool = True
    """Keep every decoder row at the norm `decoder_norm`. With false, training can evade the
    penalty: rows shrink while r_mag grows, which the penalty does not contain."""


class Gated(SAE):
    """f = 1[gate > 0] * relu(x W_enc * exp(r_mag) + b_mag), gate = x W_enc + b_gate;
    x_hat = f W_dec + b_dec.

    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv
    2404.16014). The penalty acts on the gate alone, so it does not shrink strengths. b_gate is
    the parameter `b_enc`, which decides in every architecture whether a feature fires.
    """

    architecture = "gated"
    bytes_per_activation = 34  # measured peak of an update
    per_feature = SAE.per_feature | {"r_mag": 0, "b_mag": 0}
    biases = ("b_enc", "b_mag")

    def add_parameters(self) -> None:
        self.r_mag = nn.Parameter(torch.zeros(len(self.split.own_features)))
        self.b_mag = nn.Parameter(torch.zeros(len(self.split.own_features)))

    def compute_strengths(self, pre: Matrix) -> Tensor:
        """Feature strengths of pre-activations `pre`, which are the gate."""
        scale, bias = pre.broadcast(self.r_mag.exp()), pre.broadcast(self.b_mag)
        strengths = (pre.values - pre.broadcast(self.b_enc)) * scale + bias
        return strengths.relu() * (pre.values > 0)

    def training_pass(self, x: Tensor, only_active: bool = False) -> TrainingOutput:
        """Reconstruct a batch [batch, d_in] in training; the output also holds relu(gate)."""
        output = super().training_pass(x, only_active)
        return output._replace(relu_gate=output.pre.with_values(output.pre.values.relu()))

    def fold_biases(self, offset: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        b_mag = weights["b_mag"] - offset * weights["r_mag"].exp()
        return super().fold_biases(offset, weights) | {"b_mag": b_mag}

    @torch.no_grad()
    def restart(self, indices: Tensor, columns: Tensor, rows: Tensor) -> None:
        super().restart(indices, columns, rows)
        self.r_mag[indices] = 0
        self.b_mag[indices] = 0


@dataclass(slots=True, kw_only=True)
class GatedLoss(PenaltyLoss):
    """loss = mse + l1 * sum_i(relu(gate_i) * |W_dec_i|) + mse(relu(gate) W_dec + b_dec)
    + preact * (distance of dead features to 0).

    In all terms but the first the decoder is detached, so that they train W_enc and b_gate only.
    """

    sparsity = "l1"

    l1: float = 1e-3  # for a user's preset without l1; conf/loss/gated.yaml sets 4e-3
    """Sparsity coefficient."""

    def penalty(self, sae: Gated, output: TrainingOutput, status: TrainingStatus) -> Tensor:
        """The L1 norm of relu(gate), each feature weighted by the norm of its decoder row."""
        return output.relu_gate.apply_penalty(losses.l1, RowNorms.apply(sae.W_dec.detach()))

    def terms(
        self, sae: Gated, output: TrainingOutput, target: Tensor, status: TrainingStatus
    ) -> dict[str, Tensor]:
        """The terms of `PenaltyLoss` and "gate", the mse of the reconstruction from relu(gate).
        Without it, only the penalty would train b_gate."""
        terms = PenaltyLoss.terms(self, sae, output, target, status)
        # reconstruction from f (with b_dec and W_skip) + (relu(gate) - f) W_dec
        relu_gate, strengths = output.relu_gate, output.features.values.detach()
        difference = relu_gate.with_values(relu_gate.values - strengths)
        decoded_difference = sae.split.ranks.sum(difference @ sae.W_dec.detach())
        terms["gate"] = losses.mse(output.reconstruction.detach() + decoded_difference, target)
        return terms

    def coefficients(self) -> dict[str, float]:
        # the gate's error counts as much as the reconstruction's
        return PenaltyLoss.coefficients(self) | {"gate": 1.0}
