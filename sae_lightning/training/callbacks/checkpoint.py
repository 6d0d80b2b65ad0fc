"""Saves checkpoints and SAEs during training."""

from pathlib import Path

import lightning as L

from sae_lightning.formats.saved_format import save_sae
from sae_lightning.training.checkpoints import assemble_whole
from sae_lightning.training.head import Head
from sae_lightning.training.module import SAEModule
from sae_lightning.training.schedules import is_due
from sae_lightning.training.settings import locate_kept_sae


def export_head(head: Head, folder: Path | None = None) -> None:
    """Save the head's SAE, with weights for raw activations, in `folder` (None: `sae` in its run
    folder)."""
    with assemble_whole(head, head.fold_weights()) as weights:
        if head.writes:
            save_sae(folder or head.folder / "sae", head.sae, weights, head.metadata)


class Checkpoint(L.Callback):
    """Saves checkpoints and SAEs every `every` tokens, at the end, and after a signal; keeps
    another copy of the SAEs every `keep_every` tokens."""

    def __init__(self, every: int, keep_every: int | None):
        self.every, self.keep_every = every, keep_every

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        step = trainer.global_step
        if self.keep_every and is_due(step, module.batch, self.keep_every):
            for head in module.training_heads:
                export_head(head, locate_kept_sae(head.folder, module.tokens_seen))
        if module.stopped_by:
            trainer.should_stop = True
        if module.stopped_by or step == module.steps or is_due(step, module.batch, self.every):
            heads = module.training_heads
            for head in heads:  # first: a resumed run logs only points after its checkpoint
                head.log.flush()
            trainer.save_checkpoint("all")  # saves all heads, each in its folder
            for head in heads:
                export_head(head)
