"""Keeps decoder rows at the norm that they started with, where `model.fixed_norm` asks for it."""

import lightning as L


class DecoderNorm(L.Callback):
    """Takes what would stretch a row out of the gradient, and what is left of it out of the row.

    Stands before `ClipGradient`: what is taken away is no part of the gradient's norm.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Project."""
        for head in module.training_heads:
            if head.sae.config.fixed_norm and head.sae.W_dec.grad is not None:
                head.sae.project_gradient()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Rescale: a step along the tangent leaves the sphere a little."""
        for head in module.training_heads:
            if head.sae.config.fixed_norm:
                head.sae.fix_norms()
