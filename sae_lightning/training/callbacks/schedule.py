"""Moves the learning rate and the penalties' coefficients along their schedules."""

import lightning as L

from sae_lightning.training.schedules import decay, warmup


class Schedule(L.Callback):
    """Warm-up and decay of the learning rate, warm-up of the sparsity penalty, head by head."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Set the values for the coming update."""
        step, steps = trainer.global_step, module.steps
        for group in trainer.optimizers[0].param_groups:
            optim = module.heads[group["head"]].optim
            rise, fall = warmup(step, steps, optim.warmup), decay(step, steps, optim.decay)
            group["lr"] = group["peak_lr"] * rise * fall
        for head in module.heads:
            head.progress.fill_(step / steps)
            if head.loss.sparsity:
                head.penalty_factor.fill_(warmup(step, steps, head.loss.warmup))
