"""The ReLU autoencoder (`model=relu`; its settings are `SAEConfig`), and the same network without a
sparsity penalty (`model=dense`)."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.sae import losses
from sae_lightning.sae.base import SAE, SAEConfig, TrainingOutput
from sae_lightning.sae.objective import Loss, PenaltyLoss, RowNorms, TrainingStatus


class ReLU(SAE):
    """f = relu(x W_enc + b_enc);  x_hat = f W_dec + b_dec.

    Bricken et al. 2023, "Towards Monosemanticity"; Conerly et al., "Update on how we train SAEs"
    (Anthropic, April 2024), which leaves the decoder's norms free and puts them in the penalty.
    """

    architecture = "standard"  # SAELens' name
    bytes_per_activation = 26  # measured peak of an update


@dataclass(slots=True, kw_only=True)
class DenseConfig(SAEConfig):
    """An autoencoder without sparsity: all features may fire on all tokens."""

    decoder_norm: float = 0.1
    """Norm of a decoder row at the start (Anthropic, April 2024 update)."""
    start_bias: float = 0.0
    """Encoder biases at the start, in standard deviations of a pre-activation."""


@dataclass(slots=True, kw_only=True)
class DenseLoss(Loss):
    """loss = mse: an ordinary autoencoder."""


@dataclass(slots=True, kw_only=True)
class ReLULoss(PenaltyLoss):
    """loss = mse + l1 * sum_i (f_i * |W_dec_i|)^p + preact * (distance of dead features to 0)."""

    sparsity = "l1"

    l1: float = 1e-3  # for a user's preset without l1; conf/loss/relu.yaml sets 2e-3
    """Sparsity coefficient; 1e-4 is dense, 1e-2 very sparse. Anthropic's lambda is l1 times the
    site's width."""
    p: float = 1.0
    """Final power of the penalty, which falls linearly from 1 between the end of the warm-up and
    the end of the run; below 1 it spares strong features (p-annealing, Karvonen et al. 2024: 0.2).
    At each step the term is rescaled to its value at p = 1, so that p changes only its
    gradient."""

    def __post_init__(self):
        PenaltyLoss.__post_init__(self)
        if not 0 < self.p <= 1:
            raise UserError(f"loss.p={self.p}: give a power above 0 and at most 1 (0.2 is usual)")
        if self.p < 1 and self.l1 == 0:
            raise UserError(f"loss.p={self.p} has no effect with loss.l1=0: leave one of them out")

    def penalty(self, sae: SAE, output: TrainingOutput, status: TrainingStatus) -> Tensor:
        """Mean over the batch of sum_i (f_i * |W_dec_i|)^p [], with p falling from 1 to `self.p`,
        rescaled to its value at p = 1."""
        norms = RowNorms.apply(sae.W_dec)
        if self.p == 1:
            return output.features.apply_penalty(losses.l1, norms)
        # progress since the end of the warm-up, 1 at the end; 1e-9 avoids a division by 0
        share = (float(status.progress) - self.warmup) / max(1 - self.warmup, 1e-9)
        p = 1 - (1 - self.p) * min(max(share, 0.0), 1.0)
        return output.features.apply_penalty(partial(losses.lp, p=p, ranks=sae.split.ranks), norms)
