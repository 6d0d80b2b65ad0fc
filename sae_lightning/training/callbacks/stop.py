"""Stops training on Ctrl-C or SIGTERM, after a checkpoint is saved."""

import itertools
import math
import signal
import threading

import lightning as L

from sae_lightning.errors import UserError
from sae_lightning.ranks import world
from sae_lightning.terminal import console
from sae_lightning.training.module import SAEModule


class StopOnSignal(L.Callback):
    """Asks training to stop after the current update; `Checkpoint` then saves.

    Before the first update there is nothing to save: the run stops at once, as it does at a second
    Ctrl-C. This callback comes first, to handle signals while `Normalize` waits for the pool.
    Lightning's own handler would end a run that gets SIGTERM as if it had succeeded.
    """

    def __init__(self):
        self.updating = False  # whether the first update has begun
        self.remaining = math.inf  # number of heads that still train, on all ranks
        self.printed: set[str] = set()  # lines about failed heads
        self.handlers: dict = {}

    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Install the signal handlers, in the main thread; ranks other than 0 ignore signals."""

        def stop(signal_number: int, _) -> None:
            is_second = module.received_signal and signal_number == signal.SIGINT
            if is_second or not self.updating:
                console.print(f"interrupted. Continue with\n\n  {module.resume}\n")
                raise SystemExit(128 + signal_number)  # as shells report a signal
            module.received_signal = signal.Signals(signal_number)
            console.print("stopping after this update, then saving (Ctrl-C again: stop at once)")

        if threading.current_thread() is threading.main_thread():
            # other ranks must ignore signals again: Lightning has just set its own handlers
            handler = stop if world().is_rank_zero else signal.SIG_IGN
            for signal_number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[signal_number] = signal.signal(signal_number, handler)

    def on_train_batch_start(self, *_) -> None:
        """From now on, a signal takes effect at the end of the update."""
        self.updating = True

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        """Tell all ranks if rank 0 got a signal, on which `Checkpoint` ends training, and print
        which heads have failed. UserError if no head is left."""
        training = sum(head.writes for head in module.training_heads)
        counts = [module.received_signal or 0, training]  # other ranks than 0 ignore signals
        signal_number, remaining = world().sum_counts(counts)
        if signal_number:
            module.stopped_by = signal.Signals(signal_number)
        if remaining < self.remaining:
            failed = [f"{h.name}: {h.failure}" for h in module.heads if h.writes and h.failure]
            for line in itertools.chain(*world().gather_values(failed)):
                if line not in self.printed:
                    console.print(line)
                    self.printed.add(line)
            if not remaining:
                raise UserError(
                    f"none of the {module.heads_in_pass} SAEs of this pass is left; see above"
                )
        self.remaining = remaining

    def on_train_end(self, *_) -> None:
        """Put back the previous signal handlers."""
        for signal_number, handler in self.handlers.items():
            signal.signal(signal_number, handler)
        self.handlers.clear()

    on_exception = on_train_end
