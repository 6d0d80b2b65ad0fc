"""Scores each head on held-out text while it trains."""

from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from sae_lightning.llm.splice import Scores
from sae_lightning.metrics import Quality, QualitySums
from sae_lightning.schedules import due
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.training.head import Head


class Evaluation(NamedTuple):
    """Everything that held-out text says about a head."""

    quality: Quality
    """Reconstruction and sparsity."""
    scores: Scores
    """What the LLM makes of the reconstruction."""

    def scalars(self) -> dict[str, float]:
        """The numbers by name."""
        quality = self.quality._asdict()
        del quality["density"]
        return quality | self.scores._asdict()


def evaluate(head: Head, held_out: HeldOut) -> Evaluation:
    """Score `head` on the held-out text, in its own arithmetic (no autocast), without gradient."""
    sums = QualitySums()
    device = head.in_mean.device

    def reconstruct(x: Tensor) -> Tensor:
        return head.reconstruct(x.to(device)).reconstruction.to(x.device)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        source, target = (held_out.activations(site) for site in (head.source, head.target))
        for x, y in zip(source.split(4096), target.split(4096), strict=True):
            output = head.reconstruct(x.to(device))
            sums.add(y.to(device), output.reconstruction, output.features)
        return Evaluation(sums.result(), held_out.scores(head.source, reconstruct))


def log_evaluation(head: Head, evaluation: Evaluation, tokens: int) -> None:
    """Put an evaluation into the head's TensorBoard run and keep it for `metrics.json`."""
    head.held_out_metrics = evaluation.scalars()
    head.log.scalars({f"held_out/{k}": v for k, v in head.held_out_metrics.items()}, tokens)
    head.log.density(evaluation.quality.density, tokens)
    head.log.histogram("decoder/norm", head.sae.W_dec.detach().norm(dim=1), tokens)
    head.log.flush()


class Evaluate(L.Callback):
    """Evaluates every `every` training tokens; the end of the run evaluates once more."""

    def __init__(self, every: int):
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        """Evaluate if it is time."""
        step = trainer.global_step
        if step < module.steps and due(step, module.batch, self.every):
            for head in module.heads:
                log_evaluation(head, evaluate(head, trainer.datamodule.held_out), module.tokens)
