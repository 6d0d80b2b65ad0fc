"""BatchTopK: k active features per token on average, by a threshold that training finds."""

import torch
from torch import Generator, Tensor

from sae_lightning.sae import sparse
from sae_lightning.sae.base import SAE
from sae_lightning.sae.sparse import Pattern
from sae_lightning.sae.topk import TopKConfig

MEMORY = 0.9  # decay of the threshold's running mean per update, about 10 updates long
BOUNDS = (0.8, 0.4, 0.0)  # multiples of the threshold above which to look for the largest, in turn


class BatchTopK(SAE):
    """In training: f = the batch x k largest of relu(x W_enc + b_enc) in a batch, the others 0.
    Afterwards: f = z where z = x W_enc + b_enc exceeds threshold, else 0.  x_hat = f W_dec + b_dec.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410). The threshold is the
    mean of the smallest strength that was kept, over recent batches: with it no token depends on
    its neighbours, and the SAE is a JumpReLU, as which it is saved.
    """

    architecture = "jumprelu"
    bytes_per_activation = 25

    def __init__(self, config: TopKConfig, d_in: int, d_out: int, generator: Generator):
        super().__init__(config, d_in, d_out, generator)
        # one value, in the saved format's shape
        self.register_buffer("threshold", torch.zeros(config.features))
        # corrects the bias towards the initial 0, as in Adam; goes to 1
        self.register_buffer("threshold_weight", torch.zeros(()))

    def activate(self, pre: Tensor) -> Tensor:
        """Pre-activations above the threshold."""
        return pre * (pre > self.threshold)

    def activate_batch(self, pre: Tensor) -> Tensor:
        """The batch x k largest pre-activations [batch, features], if they are positive."""
        flat = pre.flatten()
        with torch.no_grad():
            places = (flat > 0).nonzero().squeeze(1)
            count = min(len(pre) * self.config.k, len(places))
            # by place, not by value: equal strengths (bf16 has many) would all be kept
            values, chosen = flat[places].topk(count, sorted=False)
            places = places[chosen]
            if count:
                self._remember(values.min())
        kept = flat.gather(0, places)
        return torch.zeros_like(flat).scatter(0, places, kept).view_as(pre)

    def find(self, x: Tensor) -> tuple[Pattern, Tensor]:
        """The batch x k largest pre-activations of a batch [batch, d_in], if they are positive."""
        wanted = len(x) * self.config.k
        for share in BOUNDS:
            bound = share * self.threshold
            pattern, above = sparse.find(x, self.W_enc, self.b_enc - bound, sparse.positive)
            if len(pattern) >= wanted:
                break
        pre = above + bound[pattern.columns]
        found = sparse.above(pre, 0.0)  # the bias, rounded up, may have let in others
        values, chosen = pre[found].topk(min(wanted, len(found)), sorted=False)
        if len(values):
            self._remember(values.min())
        chosen = found[chosen].sort().values
        return Pattern(pattern.places[chosen], *pattern.shape), pre[chosen]

    def bound(self) -> Tensor:
        return BOUNDS[0] * self.threshold

    def _remember(self, smallest: Tensor) -> None:
        """Update the threshold's running mean with this batch's smallest strength."""
        self.threshold_weight.mul_(MEMORY).add_(1 - MEMORY)
        share = (1 - MEMORY) / self.threshold_weight
        self.threshold.lerp_(smallest.float().expand_as(self.threshold), share)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        del weights["threshold_weight"]
        return weights

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        super().load_weights(weights | {"threshold_weight": self.threshold_weight})
