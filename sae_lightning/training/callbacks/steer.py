"""Moves the sparsity coefficient until as many features are active as `loss.target_l0` asks for."""

import lightning as L
import torch

from sae_lightning.training.schedules import l0_error, steered


class Steer(L.Callback):
    """After every update, `head.steering` (the coefficient's multiple) follows the L0 of the batch.

    It waits for the end of the penalty's warm-up, in which L0 is large whatever the coefficient.
    """

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Adjust the coefficients of the heads that have a target."""
        for head in module.training_heads:
            target = getattr(head.loss, "target_l0", None)
            if target is None:
                continue
            # read together: each by itself would make the host wait for the GPU
            buffers = (head.last.l0, head.l0_error, head.penalty_factor)
            l0, before, warmed_up = torch.stack(buffers).tolist()
            if warmed_up < 1:
                continue
            now = l0_error(l0, target)
            before = now if before > 1 else before
            head.steering.mul_(steered(now, before, trainer.global_step, module.steps))
            head.l0_error.fill_(now)
