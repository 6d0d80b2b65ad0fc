"""Gives heads the weights of the SAEs that they start from."""

import lightning as L

from sae_lightning.terminal import console, make_visible
from sae_lightning.training.module import SAEModule
from sae_lightning.training.warm_start import start_head


class WarmStart(L.Callback):
    """Gives the heads with `model.start` their weights before the first step of a new run."""

    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Start this rank's heads, whose normalisation `Normalize` has measured."""
        heads = [head for head in module.heads if head.start and trainer.global_step == 0]
        lines = [start_head(head, trainer.optimizers[0]) for head in heads]
        for line in dict.fromkeys(lines):
            console.print(make_visible(line))
