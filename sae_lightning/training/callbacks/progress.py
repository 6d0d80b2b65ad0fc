"""The one bar that a person watches."""

import lightning as L
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sae_lightning.terminal import console, display

EV = "train/explained_variance"


def _range(name: str, form: str, values: list[float]) -> str:
    """The value of one SAE, the least and the largest of several."""
    ends = [form.format(value) for value in (min(values), max(values))]
    return f"{name} {'–'.join(dict.fromkeys(ends))}"


class ProgressBar(L.Callback):
    """Tokens, tokens/s, time left, L0, explained variance and dead share.

    Without a terminal it prints a line at every tenth of the run.
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Show the bar, at the step from which this process trains."""
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.shown = display(self.bar)
        self.shown.__enter__()
        self.task = self.bar.add_task(
            "training", total=module.steps, completed=trainer.global_step, text=""
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Move the bar."""
        step = trainer.global_step
        text = self._text(module)
        self.bar.update(self.task, completed=step, text=text)
        if not console.is_terminal and step * 10 // module.steps > (step - 1) * 10 // module.steps:
            console.print(f"training {100 * step // module.steps:3d}%  {text}")

    def _text(self, module: L.LightningModule) -> str:
        parts = [
            f"{module.tokens:,}/{module.steps * module.batch:,} tokens",
            f"{module.tokens_per_second:,.0f}/s",
        ]
        heads = module.training_heads
        if len(module.heads) > 1:
            parts.append(f"{len(heads)} SAEs")
        if all(head.training_metrics for head in heads):
            parts += [
                _range("L0", "{:.0f}", [h.training_metrics["train/l0"] for h in heads]),
                _range("EV", "{:.3f}", [h.training_metrics[EV] for h in heads]),
                _range("dead", "{:.1%}", [h.training_metrics["train/dead"] for h in heads]),
            ]
        return "  ".join(parts)

    def on_train_end(self, *_) -> None:
        """Leave the bar as it is."""
        self._close()

    def on_exception(self, *_) -> None:
        """Give the terminal back before the error is printed."""
        self._close()

    def _close(self) -> None:
        if hasattr(self, "shown"):
            self.shown.__exit__(None, None, None)
            del self.shown
