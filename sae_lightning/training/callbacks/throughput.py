"""Measures how fast training runs and where the time goes."""

import time

import lightning as L


class Throughput(L.Callback):
    """Tokens per second and the LLM's and the SAEs' share of the time between two log points.

    Evaluation and checkpoints are not counted. `module.speed` has the same over the whole of this
    process, for `metrics.json`.
    """

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.sae_seconds = self.batch_started = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin at the step from which this process trains; the pool's first fill is not in it."""
        self.first = self.last = self._now(trainer)

    def on_train_batch_start(self, *_) -> None:
        """The SAEs' turn begins."""
        self.batch_started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """The SAEs' turn ends; log if it is time."""
        self.sae_seconds += time.perf_counter() - self.batch_started
        step = trainer.global_step
        if step % self.log_every and step < module.steps:
            return
        now = self._now(trainer)
        recent = _speed(self.last, now, module.batch)
        self.last = now
        module.tokens_per_second = recent["tokens_per_second"]
        module.speed = _speed(self.first, now, module.batch)
        for head in module.heads:
            scalars = {f"speed/{name}": value for name, value in recent.items()}
            head.log.scalars(scalars, module.tokens)

    def _now(self, trainer: L.Trainer) -> tuple[int, float, float]:
        return trainer.global_step, self.sae_seconds, trainer.datamodule.stream.llm_seconds


def _speed(
    before: tuple[int, float, float], after: tuple[int, float, float], batch: int
) -> dict[str, float]:
    """Speed between two moments (step, seconds of the SAEs, seconds of the LLM)."""
    steps, sae, llm = (b - a for a, b in zip(before, after, strict=True))
    return {
        "tokens_per_second": steps * batch / (sae + llm),
        "llm_share": llm / (sae + llm),
        "sae_share": sae / (sae + llm),
    }
