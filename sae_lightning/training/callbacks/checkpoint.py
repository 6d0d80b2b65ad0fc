"""Writes everything that a killed run needs, and the SAE itself, while training goes on."""

import lightning as L

from sae_lightning.export import atomically, save_sae
from sae_lightning.schedules import due
from sae_lightning.training.head import Head


def export(head: Head) -> None:
    """Write the head's SAE, for raw activations, into its run folder."""
    save_sae(head.folder / "sae", head.sae.architecture, head.folded(), head.metadata)


class Checkpoint(L.Callback):
    """Saves the checkpoint and every `sae/` at regular tokens, at the end, and when asked to stop.

    This callback comes last in the list, so that what it saves includes the others' work.
    """

    def __init__(self, every: int, settings: dict):
        """`settings` are stored in the checkpoint, which later has to fit the run's config."""
        self.every, self.settings = every, settings

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Save if it is time or if the run was asked to stop."""
        step = trainer.global_step
        if module.stopped_by:
            trainer.should_stop = True
        if module.stopped_by or step == module.steps or due(step, module.batch, self.every):
            self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write curves, checkpoint and SAEs, each atomically; a resumed run redraws only what
        comes after the checkpoint, so the curves go first."""
        for head in module.heads:
            head.log.flush()
        with atomically(module.checkpoint) as temporary:
            trainer.save_checkpoint(temporary)
        for head in module.heads:
            export(head)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, saved: dict):
        """Write down which settings the weights belong to."""
        saved["settings"] = self.settings
