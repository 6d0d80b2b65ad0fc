"""The progress bar of training."""

import lightning as L
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sae_lightning.terminal import console, show_live
from sae_lightning.training.module import SAEModule


class ProgressBar(L.Callback):
    """Shows tokens, tokens/s, time left, L0, explained variance and the share of dead features; for
    several SAEs the smallest and the largest value.

    If the output is not a terminal, it prints a line after every tenth of the run instead.
    """

    def on_train_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Show the bar; a resumed run starts at the step it had reached."""
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
        self.live = show_live(self.bar)
        self.live.__enter__()
        self.task = self.bar.add_task(
            "training", total=module.steps, completed=trainer.global_step, text=""
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        step, text = trainer.global_step, _format_progress(module)
        self.bar.update(self.task, completed=step, text=text)
        if not console.is_terminal and step * 10 // module.steps > (step - 1) * 10 // module.steps:
            console.print(f"training {100 * step // module.steps:3d}%  {text}")

    def on_train_end(self, *_) -> None:
        """Remove the bar; after an error, before the error is printed."""
        if hasattr(self, "live"):  # not if an error came before `on_train_start`
            self.live.__exit__(None, None, None)
            del self.live

    on_exception = on_train_end


def _format_progress(module: SAEModule) -> str:
    """The text beside the bar; without metrics until the first log point."""
    parts = [
        f"{module.tokens_seen:,}/{module.steps * module.batch:,} tokens",
        f"{module.tokens_per_second:,.0f}/s",
    ]
    latest = module.latest_metrics
    if latest and module.heads_in_pass > 1:
        parts.append(f"{len(latest)} SAEs")
    if latest:
        for name, tag, form in (
            ("L0", "train/l0", "{:.0f}"),
            ("EV", "train/explained_variance", "{:.3f}"),
            ("dead", "train/dead", "{:.1%}"),
        ):
            values = [metrics[tag] for metrics in latest]
            ends = [form.format(value) for value in (min(values), max(values))]
            parts.append(f"{name} {'–'.join(dict.fromkeys(ends))}")  # once if both look the same
    return "  ".join(parts)
