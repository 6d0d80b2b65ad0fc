"""Scores each head on held-out text while it trains."""

import lightning as L

from sae_lightning.metrics import density_histogram
from sae_lightning.schedules import due
from sae_lightning.scorecard import score
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.training.head import Head


def evaluate(head: Head, held_out: HeldOut, tokens: int) -> None:
    """Score `head` after `tokens` training tokens; the result goes to its log and its metrics."""
    card = score(head.reconstruct, held_out, head.source, head.target)
    head.held_out_metrics = card.scalars()
    head.log.scalars({f"held_out/{k}": v for k, v in head.held_out_metrics.items()}, tokens)
    head.density = density_histogram(card.quality.density)
    head.log.density(card.quality.density, tokens)
    head.log.histogram("decoder/norm", head.sae.W_dec.detach().norm(dim=1), tokens)
    head.log.flush()


class Evaluate(L.Callback):
    """Evaluates every `every` training tokens; the end of the run evaluates once more."""

    def __init__(self, every: int):
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Evaluate if it is time."""
        step = trainer.global_step
        if step < module.steps and due(step, module.batch, self.every):
            for head in module.heads:
                evaluate(head, trainer.datamodule.held_out, module.tokens)
