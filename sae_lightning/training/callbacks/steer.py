"""Moves the sparsity coefficient until as many features are active as `loss.target_l0` asks for."""

import lightning as L

from sae_lightning.schedules import steered


class Steer(L.Callback):
    """After every update, `head.steering` (the coefficient's multiple) follows the L0 of the batch.

    Training batches alone decide; what is aimed at is the L0 of the update, before the next one.
    """

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Adjust the coefficients of the heads that have a target."""
        for head in module.training_heads:
            target = getattr(head.loss, "target_l0", None)
            if target is not None:
                factor = steered(float(head.last.l0), target)
                head.steering.mul_(factor)
