"""Training speed, where the time goes, and peak memory."""

import sys
from collections.abc import Collection
from time import perf_counter
from typing import NamedTuple

import lightning as L
import torch

from sae_lightning.training.module import SAEModule
from sae_lightning.training.schedules import is_due


class Elapsed(NamedTuple):
    """Updates and seconds so far."""

    steps: int
    seconds: float
    """Training time; only differences are meaningful."""
    stream: float
    """Part of `seconds` that the stream (LLM included) and `loss.kl` took."""
    llm: float
    """Part of `seconds` that the LLM and `loss.kl` took."""


class Throughput(L.Callback):
    """Logs tokens per second since the last log point and, with LLM and SAEs on a CPU, the shares
    of time in the LLM, the rest of the stream (text, tokens, pool) and the SAEs. `module.speed` has
    the same numbers for the time since this process started, for `metrics.json`.

    CPU           stream SAEs | others | stream SAEs | others | ...      counted: all but others
    accelerator   stream SAEs others stream SAEs | pause | ...           counted: all but pauses

    "others" are the callbacks that follow, a "pause" is an evaluation or a checkpoint. An
    accelerator runs asynchronously. Synchronising at every update would slow training down, so it
    is synchronised only at log points and before pauses, and no shares are measured.
    """

    def __init__(self, log_every: int, pause_every: Collection[int]):
        """`log_every`: updates between two log points; `pause_every`: tokens between two pauses of
        training, one number for evaluations and others for checkpoints."""
        self.log_every, self.pause_every = log_every, pause_every
        self.idle = 0.0  # seconds in pauses so far

    def on_fit_start(self, trainer: L.Trainer, module: SAEModule) -> None:
        """Start the clock: a resumed run starts at the update of its checkpoint."""
        # training begins in a pause, which ends when the stream begins to make the first batch
        self.first = self.last = self.pause_start = self._read_clock(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_) -> None:
        """End a pause, which lasted until the stream began to make this batch."""
        if self.pause_start:
            now, start = self._read_clock(trainer), self.pause_start
            making_batch = now.stream - start.stream
            self.idle += now.seconds - start.seconds - making_batch
            self.pause_start = None

    def on_train_batch_end(self, trainer: L.Trainer, module: SAEModule, *_) -> None:
        """Begin a pause if other callbacks may take time now; log if this is a log point."""
        step, devices = trainer.global_step, {module.device, trainer.datamodule.stream.device}
        on_cpu = all(device.type == "cpu" for device in devices)
        is_log_point = step % self.log_every == 0 or step >= module.steps
        pause_begins = on_cpu or step in module.tuning_starts
        pause_begins |= any(is_due(step, module.batch, every) for every in self.pause_every)
        if not on_cpu and (is_log_point or pause_begins):
            torch.accelerator.synchronize()
        now = self._read_clock(trainer)
        self.pause_start = now if pause_begins else None
        if not is_log_point:
            return
        recent = _compute_speed(self.last, now, module.batch, shares=on_cpu)
        self.last = now
        module.tokens_per_second = recent["tokens_per_second"]
        module.speed = _compute_speed(self.first, now, module.batch, shares=on_cpu)
        for head in module.training_heads:
            scalars = {f"speed/{name}": value for name, value in recent.items()}
            head.log.add_scalars(scalars, module.tokens_seen)

    def _read_clock(self, trainer: L.Trainer) -> Elapsed:
        """Updates so far, and training time without pauses."""
        stream, seconds = trainer.datamodule.stream, perf_counter() - self.idle
        tuning = trainer.lightning_module.tuning_seconds
        return Elapsed(
            trainer.global_step, seconds, stream.seconds + tuning, stream.llm_seconds + tuning
        )


def _compute_speed(before: Elapsed, after: Elapsed, batch: int, shares: bool) -> dict[str, float]:
    """Tokens per second between two times and, with `shares`, the shares of time, by name."""
    steps, seconds, stream, llm = (b - a for a, b in zip(before, after, strict=True))
    speed = {"tokens_per_second": steps * batch / seconds}
    if shares:
        speed["llm_share"] = llm / seconds
        speed["data_share"] = (stream - llm) / seconds
        speed["sae_share"] = (seconds - stream) / seconds
    return speed


def measure_peak_memory_gb() -> float:
    """Peak memory of this process in GB: on its GPUs if it used any, else in RAM."""
    gpus = range(torch.cuda.device_count())
    on_gpus = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    if on_gpus:
        return on_gpus / 1e9
    if sys.platform == "win32":  # has no getrusage
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
