"""Clips each head's gradient by itself."""

import lightning as L
import torch


class ClipGradient(L.Callback):
    """Scales a head's gradient down to `optim.clip`; the norm before clipping is a buffer.

    Lightning's own clipping takes one norm over all heads, so that a head would depend on its
    neighbours.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Clip, after checking that the gradient is finite."""
        for head in module.training_heads:
            limit = float("inf") if head.optim.clip is None else head.optim.clip
            norm = torch.nn.utils.clip_grad_norm_(head.sae.parameters(), limit)
            if norm.isfinite():
                head.grad_norm.copy_(norm)
            else:
                module.fail(head, "the gradient")
