"""Gives heads the weights of the SAEs that they start from."""

import lightning as L

from sae_lightning.terminal import console, make_visible
from sae_lightning.training.callbacks.evaluation import evaluate_heads
from sae_lightning.training.warm_start import start_head


class WarmStart(L.Callback):
    """Before the first step of a new run, gives the heads with `model.start` the weights to start
    from, and scores them: the first point of their held-out curves is the SAE that they start
    from."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the heads of this rank; all ranks score them together."""
        if trainer.global_step > 0 or not module.starts_warm:
            return
        heads = [head for head in module.heads if head.start]
        lines = [start_head(head, trainer.optimizers[0]) for head in heads]
        for line in dict.fromkeys(lines):
            console.print(make_visible(line))
        evaluate_heads(heads, trainer.datamodule.held_out, tokens=0)
