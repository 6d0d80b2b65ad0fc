"""JumpReLU: every feature has a threshold, learned through straight-through gradients."""

import math
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn

from sae_lightning.errors import UserError
from sae_lightning.sae import sparse
from sae_lightning.sae.base import SAE, SAEConfig, TrainingOutput
from sae_lightning.sae.losses import tanh_l0
from sae_lightning.sae.matrix import Matrix
from sae_lightning.sae.objective import PenaltyLoss, RowNorms, TrainingStatus
from sae_lightning.sae.sparse import SparsityPattern


@dataclass(slots=True, kw_only=True)
class JumpReLUConfig(SAEConfig):
    """An SAE whose features have learned thresholds."""

    decoder_norm: float = 0.1
    """Norm of a decoder row at the start (Anthropic, April 2024 update)."""
    start_bias: float = 0.0
    """Encoder biases at the start, in standard deviations of a pre-activation."""
    threshold: float = 0.1
    """Threshold of every feature at the start (Anthropic, January 2025 update: 0.1)."""
    bandwidth: float = 2.0
    """Width of the window around a threshold: only pre-activations in it give the threshold a
    gradient. Anthropic: 2; Rajamanoharan et al.: 0.001 for inputs of norm 1, which is 0.001 sqrt(d)
    here, where inputs have norm sqrt(d)."""

    def __post_init__(self):
        SAEConfig.__post_init__(self)
        for name in ("threshold", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)}: give a positive number")


class _Jump(torch.autograd.Function):
    """z * 1[z > threshold]. The gradient for the threshold, averaged over a window of this width,
    is -threshold / width * 1[|z - threshold| < width / 2]. Thresholds broadcast with z."""

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.width / 2
        threshold_gradient = gradient * window * threshold * (-1 / ctx.width)
        return gradient * (z > threshold), threshold_gradient.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """1[z > threshold]; the threshold's gradient is -1 / width * 1[|z - threshold| < width / 2]."""

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return (z > threshold).float()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.width / 2
        threshold_gradient = gradient * window * (-1 / ctx.width)
        return None, threshold_gradient.sum_to_size(threshold.shape), None


class JumpReLU(SAE):
    """f = z * 1[z > threshold], z = x W_enc + b_enc;  x_hat = f W_dec + b_dec.

    Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with JumpReLU
    sparse autoencoders" (arXiv 2407.14435). Thresholds are learned as logarithms, so that they stay
    positive.
    """

    architecture = "jumprelu"
    bytes_per_activation = 30  # measured peak of an update
    per_feature = SAE.per_feature | {"log_threshold": 0}
    biases = ("b_enc", "log_threshold")

    def add_parameters(self) -> None:
        start = torch.full((len(self.split.own_features),), math.log(self.config.threshold))
        self.log_threshold = nn.Parameter(start)

    @property
    def threshold(self) -> Tensor:
        """Threshold of each feature [features], always positive."""
        return self.log_threshold.exp()

    def compute_strengths(self, pre: Matrix) -> Tensor:
        """Pre-activations above their threshold; 0 in place of the others."""
        return _Jump.apply(pre.values, pre.broadcast(self.threshold), self.config.bandwidth)

    def find_entries(self, x: Tensor) -> tuple[SparsityPattern, Tensor]:
        """The pre-activations above their threshold or in the window around it."""
        threshold = self.threshold.detach()
        # The excess over the threshold is compared, because rounding errors are smallest near 0.
        # The window begins 0.5 bandwidths below the threshold; 0.51 leaves a margin for rounding.
        choose = partial(sparse.find_above, bound=-0.51 * self.config.bandwidth)
        pattern, excess = sparse.encode_entries(x, self.W_enc, self.b_enc - threshold, choose)
        pattern.has_zeros = True  # in the window below the threshold, strengths are 0
        return pattern, excess + threshold[pattern.columns]

    def entry_bound(self) -> Tensor:
        return self.threshold - self.config.bandwidth / 2

    def thresholds_for(self, indices: Tensor) -> Tensor:
        return self.threshold.detach()[indices]

    def count_active(self, pre: Matrix) -> Tensor:
        """Mean number of active features per token [], of this rank, with a gradient for
        thresholds only."""
        steps = _Step.apply(pre.values, pre.broadcast(self.threshold), self.config.bandwidth)
        return steps.sum() / pre.batch_size

    @torch.no_grad()
    def restart(self, indices: Tensor, columns: Tensor, rows: Tensor) -> None:
        super().restart(indices, columns, rows)
        self.log_threshold[indices] = math.log(self.config.threshold)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        return weights | {"threshold": weights.pop("log_threshold").exp()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        # a threshold of 0 has no logarithm
        threshold = weights["threshold"].clamp(min=torch.finfo(torch.float32).tiny)
        others = {name: weight for name, weight in weights.items() if name != "threshold"}
        super().load_weights(others | {"log_threshold": threshold.log()})


class PenaltyKind(Enum):
    """How the penalty counts active features."""

    tanh = "tanh"
    step = "step"


@dataclass(slots=True, kw_only=True)
class JumpReLULoss(PenaltyLoss):
    """loss = mse + l0 * (active features) + preact * (distance of dead features to thresholds)."""

    sparsity = "l0"

    l0: float = 1e-3  # for a user's preset without l0; conf/loss/jumprelu.yaml sets 1.7e-4
    """Sparsity coefficient."""
    penalty_kind: PenaltyKind = PenaltyKind.tanh
    """tanh (sum of tanh(tanh_scale * f_i * |W_dec_i|), Anthropic, January 2025 update) or step (the
    exact count, Rajamanoharan et al. 2024, which trains only the thresholds)."""
    tanh_scale: float | None = None
    """Steepness of the smooth count (tanh); null for 4."""

    def __post_init__(self):
        PenaltyLoss.__post_init__(self)
        if self.tanh_scale is None:
            return
        if self.penalty_kind is PenaltyKind.step:
            raise UserError(
                f"loss.tanh_scale={self.tanh_scale} has no effect with loss.penalty_kind=step, "
                "which counts exactly: leave it out"
            )
        if not 0 < self.tanh_scale < math.inf:
            raise UserError(
                f"loss.tanh_scale={self.tanh_scale}: give a positive number, or null for 4"
            )

    def penalty(self, sae: JumpReLU, output: TrainingOutput, status: TrainingStatus) -> Tensor:
        """Mean number of active features per token [], as an exact or a smooth count."""
        if self.penalty_kind is PenaltyKind.step:
            return sae.count_active(output.pre)
        smooth = partial(tanh_l0, scale=self.tanh_scale or 4.0)
        return output.features.apply_penalty(smooth, RowNorms.apply(sae.W_dec))
