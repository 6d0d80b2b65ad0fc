"""Clips each head's gradient by itself."""

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from sae_lightning.training.head import Head


class ClipGradient(L.Callback):
    """Scales a head's gradient down to `optim.clip`; the norm before clipping is a buffer.

    Lightning's own clipping takes one norm over all heads, so that a head would depend on its
    neighbours.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Clip, and freeze the heads whose loss or gradient is not finite."""
        heads = module.training_heads
        with record_function("clip"):
            norms = [_clip(head) for head in heads]
            # read together: each by itself would make the host wait for the GPU
            sums = [norm + head.last.loss for head, norm in zip(heads, norms, strict=True)]
            finite = torch.stack(sums).isfinite().tolist()
        for head, norm, is_finite in zip(heads, norms, finite, strict=True):
            if is_finite:
                head.grad_norm.copy_(norm)
            else:
                module.fail(head)


def _clip(head: Head) -> Tensor:
    """Clip a head's gradient; its norm before."""
    parameters = list(head.sae.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    limit = head.optim.clip
    # on a CPU the norm is known, and it costs nothing to leave alone what is short enough
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        clip_grads_with_norm_(parameters, limit, norm)
    return norm
