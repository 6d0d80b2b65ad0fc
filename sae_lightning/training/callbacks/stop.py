"""Stops training on Ctrl-C or SIGTERM, after a checkpoint is saved."""

import signal
import threading

import lightning as L

from sae_lightning.terminal import console


class StopOnSignal(L.Callback):
    """Asks training to stop after the current update; `Checkpoint` then saves.

    Before the first update there is nothing to save: the run stops at once, as it does at a second
    Ctrl-C. This callback comes first, to handle signals while `Normalize` waits for the pool.
    Lightning's own handler would end a run that gets SIGTERM as if it had succeeded.
    """

    def __init__(self):
        self.updating = False
        self.handlers: dict = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Install the signal handlers, in the main thread."""

        def stop(number: int, _) -> None:
            if not self.updating or module.stopped_by and number == signal.SIGINT:
                console.print(f"interrupted. Continue with\n\n  {module.resume}\n")
                raise SystemExit(128 + number)
            module.stopped_by = signal.Signals(number)
            console.print("stopping after this update, then saving (Ctrl-C again: stop at once)")

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, stop)

    def on_train_batch_start(self, *_) -> None:
        """From now on a signal waits for the end of the update, then training saves."""
        self.updating = True

    def on_train_end(self, *_) -> None:
        """Put back the previous signal handlers."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers.clear()

    on_exception = on_train_end
