"""Measures how fast training runs and where the time goes."""

import time

import lightning as L


class Throughput(L.Callback):
    """Tokens per second and the LLM's and the SAEs' share of the time between two log points.

    Evaluation and checkpoints are not counted; `metrics.json` has the run's wall time too.
    """

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.sae_seconds = 0.0
        self.batch_started = 0.0
        self.last = (0, 0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin at the step from which this process trains; the pool's first fill is not in it."""
        self.last = (trainer.global_step, 0.0, trainer.datamodule.stream.llm_seconds)

    def on_train_batch_start(self, *_) -> None:
        """The SAEs' turn begins."""
        self.batch_started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """The SAEs' turn ends; log if it is time."""
        self.sae_seconds += time.perf_counter() - self.batch_started
        step, stream = trainer.global_step, trainer.datamodule.stream
        if step % self.log_every:
            return
        steps = step - self.last[0]
        sae = self.sae_seconds - self.last[1]
        llm = stream.llm_seconds - self.last[2]
        self.last = (step, self.sae_seconds, stream.llm_seconds)
        module.tokens_per_second = steps * module.batch / (sae + llm)
        for head in module.heads:
            head.log.scalars(
                {
                    "speed/tokens_per_second": module.tokens_per_second,
                    "speed/llm_share": llm / (sae + llm),
                    "speed/sae_share": sae / (sae + llm),
                },
                module.tokens,
            )
