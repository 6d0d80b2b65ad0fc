"""BatchTopK: k active features per token on average; in evaluation, a threshold."""

import torch
from torch import Tensor

from sae_lightning.sae import sparse
from sae_lightning.sae.base import SAE
from sae_lightning.sae.sparse import SparsityPattern

THRESHOLD_DECAY = 0.9  # per update, of the threshold's running mean (about 10 updates long)
# Multiples of the threshold: lower bounds, tried in turn until batch * k values exceed one.
BOUND_FACTORS = (0.8, 0.4, 0.0)


class BatchTopK(SAE):
    """In training: f = the batch * k largest of relu(x W_enc + b_enc) in a batch, the others 0.
    In evaluation: f = z * 1[z > threshold], z = x W_enc + b_enc.  x_hat = f W_dec + b_dec.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410). The threshold is the
    running mean of the smallest strength kept in each batch. With it, tokens do not depend on one
    another in evaluation, and the SAE is saved as a JumpReLU SAE.
    """

    architecture = "jumprelu"
    features_compete = True
    bytes_per_activation = 25  # measured peak of an update

    def add_parameters(self) -> None:
        # the same value for every feature, in the shape of the saved format
        self.register_buffer("threshold", torch.zeros(len(self.split.own_features)))
        # weight of all updates in `threshold`, to correct for its initial 0, as in Adam
        self.register_buffer("threshold_weight", torch.zeros(()))

    def activate(self, pre: Tensor) -> Tensor:
        """Pre-activations above the threshold; 0 in place of the others."""
        return pre * (pre > self.threshold)

    def activate_batch(self, pre: Tensor) -> Tensor:
        """The batch * k largest pre-activations, if positive; 0 in place of the others."""
        flat, k = pre.flatten(), len(pre) * self.config.k
        with torch.no_grad():
            positive = (flat > 0).nonzero().squeeze(1)
            # chosen by index: comparing values would keep all ties (bf16 has many)
            largest = flat[positive].topk(min(k, len(positive)), sorted=False).indices
            indices = positive[largest]
        strengths = self.split.ranks.keep_largest(flat.gather(0, indices), k)
        self._update_threshold(strengths.detach())
        return torch.zeros_like(flat).scatter(0, indices, strengths).view_as(pre)

    def find_entries(self, x: Tensor) -> tuple[SparsityPattern, Tensor]:
        """The batch * k largest pre-activations of a batch [batch, d_in], if they are positive."""
        k = len(x) * self.config.k
        for factor in BOUND_FACTORS:
            bound = factor * self.threshold
            pattern, excess = sparse.encode_entries(
                x, self.W_enc, self.b_enc - bound, sparse.find_positive
            )
            if self.split.ranks.sum_counts([len(pattern)])[0] >= k:
                break
        pre = excess + bound[pattern.columns]
        # `encode_entries` also returns some entries whose exact values are <= 0
        positive = sparse.find_above(pre, 0.0)
        strengths, places = pre[positive].topk(min(k, len(positive)), sorted=False)
        entries = positive[places]
        # sets a strength to 0 if it is not among the k largest of all ranks
        strengths = self.split.ranks.keep_largest(strengths, k)
        self._update_threshold(strengths)
        kept = entries[sparse.find_above(strengths, 0.0)].sort().values  # in CSR order
        return SparsityPattern(pattern.flat_indices[kept], *pattern.shape), pre[kept]

    def entry_bound(self) -> Tensor:
        """The bound [features] that `find_entries` tries first."""
        return BOUND_FACTORS[0] * self.threshold

    @torch.no_grad()
    def _update_threshold(self, strengths: Tensor) -> None:
        """Update the running mean with the smallest positive of `strengths` [n] on all ranks."""
        smallest = self.split.ranks.find_smallest(strengths)
        if smallest is None:
            return
        self.threshold_weight.mul_(THRESHOLD_DECAY).add_(1 - THRESHOLD_DECAY)
        weight = (1 - THRESHOLD_DECAY) / self.threshold_weight
        self.threshold.lerp_(smallest.float().expand_as(self.threshold), weight)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        del weights["threshold_weight"]
        return weights

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        # a loaded threshold needs no bias correction
        super().load_weights(weights | {"threshold_weight": torch.ones(())})
