"""Saves checkpoints and SAEs during training."""

import lightning as L

from sae_lightning.formats.export import save_sae
from sae_lightning.training.head import Head
from sae_lightning.training.schedules import is_due
from sae_lightning.training.settings import checkpoint_path


def export_head(head: Head) -> None:
    """Save the head's SAE, with weights for raw activations, in its run folder."""
    save_sae(head.folder / "sae", head.sae, head.fold_weights(), head.metadata)


class Checkpoint(L.Callback):
    """Saves checkpoints and SAEs every `every` tokens, at the end, and when asked to stop."""

    def __init__(self, every: int):
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Save if it is time or if the run was asked to stop."""
        step = trainer.global_step
        if module.stopped_by:
            trainer.should_stop = True
        if module.stopped_by or step == module.steps or is_due(step, module.batch, self.every):
            heads = module.training_heads
            for head in heads:  # before saving: a resumed run logs only later points
                head.log.flush()
            trainer.save_checkpoint(checkpoint_path(heads[0].folder))  # saves all heads
            for head in heads:
                export_head(head)
