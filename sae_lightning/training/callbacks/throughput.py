"""Measures how fast training runs and where the time goes."""

import sys
import time

import lightning as L
import torch


class Throughput(L.Callback):
    """Tokens per second, and the shares of the LLM, of the rest of the stream (text, tokens, pool)
    and of the SAEs, between two log points.

    Evaluation and checkpoints are not counted; the first fill of the pool is. `module.speed` has
    the same over the whole of this process, for `metrics.json`.
    """

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.sae_seconds = self.batch_started = 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin at the update from which this process trains."""
        self.first = self.last = self._now(trainer)

    def on_train_batch_start(self, *_) -> None:
        """The SAEs' turn begins."""
        self.batch_started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """The SAEs' turn ends; log if it is time."""
        if module.device.type != "cpu":
            torch.accelerator.synchronize()  # or the update would count as the LLM's time
        self.sae_seconds += time.perf_counter() - self.batch_started
        step = trainer.global_step
        if step % self.log_every and step < module.steps:
            return
        now = self._now(trainer)
        recent = _speed(self.last, now, module.batch)
        self.last = now
        module.tokens_per_second = recent["tokens_per_second"]
        module.speed = _speed(self.first, now, module.batch)
        for head in module.training_heads:
            scalars = {f"speed/{name}": value for name, value in recent.items()}
            head.log.scalars(scalars, module.tokens)

    def _now(self, trainer: L.Trainer) -> tuple[int, float, float, float]:
        stream = trainer.datamodule.stream
        return trainer.global_step, self.sae_seconds, stream.llm_seconds, stream.seconds


def _speed(before: tuple, after: tuple, batch: int) -> dict[str, float]:
    """Speed between two moments (step; seconds of the SAEs, the LLM, the stream with the LLM)."""
    steps, sae, llm, stream = (b - a for a, b in zip(before, after, strict=True))
    return {
        "tokens_per_second": steps * batch / (sae + stream),
        "llm_share": llm / (sae + stream),
        "data_share": (stream - llm) / (sae + stream),
        "sae_share": sae / (sae + stream),
    }


def peak_memory_gb() -> float:
    """The most memory this process has held, in GB: on its GPUs if it used any, else RAM."""
    gpus = range(torch.cuda.device_count())
    on_gpus = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    if on_gpus:
        return on_gpus / 1e9
    if sys.platform == "win32":  # has no getrusage
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
