"""Writes everything that a killed run needs, and the SAE itself, while training goes on."""

import signal
import threading
from pathlib import Path

import lightning as L

from sae_lightning.export import atomically, save_sae
from sae_lightning.schedules import due
from sae_lightning.terminal import console
from sae_lightning.training.head import Head


def export(head: Head) -> None:
    """Write the head's SAE, for raw activations, into its run folder."""
    save_sae(head.folder / "sae", head.sae.architecture, head.folded(), head.metadata)


class Checkpoint(L.Callback):
    """Saves `last.ckpt` and every `sae/` at regular tokens, at the end, and when asked to stop.

    Ctrl-C and SIGTERM finish the current step, save and stop; a second Ctrl-C stops at once.
    This callback comes last in the list, so that what it saves includes the others' work.
    """

    def __init__(self, path: Path, every: int, settings: dict):
        """`settings` are stored in the checkpoint, which later has to fit the run's config."""
        self.path, self.every, self.settings = path, every, settings
        self.stopped_by: signal.Signals | None = None
        self.handlers: dict = {}

    def on_train_start(self, *_) -> None:
        """Listen to Ctrl-C and SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        if self.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number)
        console.print("stopping: this step is finished and saved first (Ctrl-C again: at once)")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Save if it is time or if the run was asked to stop."""
        step = trainer.global_step
        if self.stopped_by:
            trainer.should_stop = True
        if self.stopped_by or step == module.steps or due(step, module.batch, self.every):
            self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the checkpoint and the SAEs, each atomically."""
        with atomically(self.path) as temporary:
            trainer.save_checkpoint(temporary)
        for head in module.heads:
            export(head)
            head.log.flush()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, saved: dict):
        """Write down which settings the weights belong to."""
        saved["settings"] = self.settings

    def on_train_end(self, *_) -> None:
        """Stop listening."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers.clear()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, error: BaseException):
        """Stop listening; after an impatient Ctrl-C say what is left."""
        self.on_train_end()
        if isinstance(error, KeyboardInterrupt):
            console.print(
                f"interrupted; resume={self.path.parents[1]} continues from "
                f"{'the last checkpoint' if self.path.exists() else 'the beginning'}"
            )
