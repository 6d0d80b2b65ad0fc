"""The recipe around the loss, as Lightning callbacks.

Hooks follow one another from left to right, callbacks within a hook from top to bottom:

                fit_start  train_start   batch_start   before_optimizer_step  batch_end   train_end
                           |             |<----------- every update ------------------->|
    StopOnSignal           listen        defer signals                        tell ranks  restore
    Normalize              mean, scale
    WarmStart              weights
    Schedule                             lr, penalty
    DecoderNorm                                        project gradient       renormalise
    KeepControl            directions                                         turn rows back
    ClipGradient                                       clip, freeze heads
    TargetL0                                                                  coefficient
    Throughput  start                    end of pause                         speed
    Curves                                                                    log
    Resample                                                                  restart dead
    Evaluate               score warm                                         score
    ProgressBar            show                                               advance     close
    Checkpoint                                                                save, stop

`SAEModule.training_step` computes losses and gradients between batch_start and
before_optimizer_step; Adam's step comes before batch_end. on_exception does what train_end does.
"""

import lightning as L

from sae_lightning.training.callbacks.checkpoint import Checkpoint
from sae_lightning.training.callbacks.curves import Curves
from sae_lightning.training.callbacks.evaluation import Evaluate
from sae_lightning.training.callbacks.keep_control import KeepControl
from sae_lightning.training.callbacks.normalize import Normalize
from sae_lightning.training.callbacks.progress import ProgressBar
from sae_lightning.training.callbacks.resample import Resample
from sae_lightning.training.callbacks.start_heads import WarmStart
from sae_lightning.training.callbacks.stop import StopOnSignal
from sae_lightning.training.callbacks.throughput import Throughput
from sae_lightning.training.callbacks.update import ClipGradient, DecoderNorm, Schedule, TargetL0
from sae_lightning.training.settings import EvalConfig, TrainerConfig


def make_callbacks(trainer: TrainerConfig, eval: EvalConfig) -> list[L.Callback]:
    """Make the callbacks of a run, in order: Throughput stops its clock before the slow callbacks,
    curves are logged before resampling changes what they show, the checkpoint is saved last."""
    pauses = (eval.every, trainer.checkpoint_every, trainer.keep_every)
    return [
        StopOnSignal(),
        Normalize(),
        WarmStart(),
        Schedule(),
        DecoderNorm(),
        KeepControl(),
        ClipGradient(),
        TargetL0(),
        Throughput(trainer.log_every, pause_every=[every for every in pauses if every]),
        Curves(trainer.log_every),
        Resample(),
        Evaluate(eval.every),
        ProgressBar(),
        Checkpoint(trainer.checkpoint_every, trainer.keep_every),
    ]
