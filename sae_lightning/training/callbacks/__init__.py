"""The recipe around the loss, as Lightning callbacks. Their order is decided here."""

import lightning as L

from sae_lightning.training.callbacks.checkpoint import Checkpoint
from sae_lightning.training.callbacks.clip import ClipGradient
from sae_lightning.training.callbacks.curves import Curves
from sae_lightning.training.callbacks.decoder_norm import DecoderNorm
from sae_lightning.training.callbacks.evaluate import Evaluate
from sae_lightning.training.callbacks.normalize import Normalize
from sae_lightning.training.callbacks.progress import ProgressBar
from sae_lightning.training.callbacks.resample import Resample
from sae_lightning.training.callbacks.schedule import Schedule
from sae_lightning.training.callbacks.steer import Steer
from sae_lightning.training.callbacks.stop import StopOnSignal
from sae_lightning.training.callbacks.throughput import Throughput
from sae_lightning.training.settings import EvalConfig, TrainerConfig


def standard(trainer: TrainerConfig, eval: EvalConfig) -> list[L.Callback]:
    """The callbacks of every run, in the order in which they act.

    Throughput stops its clock before the slower ones start; curves are drawn before resampling
    changes what they show; the checkpoint is last and saves what all others did.
    """
    return [
        StopOnSignal(),
        Normalize(),
        Schedule(),
        DecoderNorm(),
        ClipGradient(),
        Steer(),
        Throughput(trainer.log_every, pauses=(eval.every, trainer.checkpoint_every)),
        Curves(trainer.log_every),
        Resample(),
        Evaluate(eval.every),
        ProgressBar(),
        Checkpoint(trainer.checkpoint_every),
    ]
