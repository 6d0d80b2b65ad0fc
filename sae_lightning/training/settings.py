"""Settings of training: plain dataclasses, so that reading a config does not import lightning.

Units: tokens unless a field says otherwise; a share is a fraction of the run, from 0 to 1.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sae_lightning.errors import UserError


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value}: give a share of the run, from 0 to 1")


def _check_positive(name: str, value: float, remedy: str = "give a positive number") -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value}: {remedy}")


def locate_checkpoint(folder: Path) -> Path:
    """Path of the checkpoint of the run in `folder`."""
    return folder / "checkpoints" / "last.ckpt"


def locate_stream(folder: Path, step: int) -> Path:
    """Path of the stream's state at update `step`."""
    return folder / "checkpoints" / f"stream-{step}.pt"


def locate_kept_sae(folder: Path, tokens: int) -> Path:
    """Folder of the SAE that a run keeps after `tokens` training tokens."""
    return folder / f"sae-{tokens}"


def locate_failure(folder: Path) -> Path:
    """Path of the file that says why a run failed."""
    return folder / "failure.json"


class Accelerator(Enum):
    """Device on which the SAEs train."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Precision(Enum):
    """Arithmetic of the SAE's matrix products; weights and Adam's state are always fp32."""

    auto = "auto"
    fp32 = "32-true"
    bf16 = "bf16-mixed"
    vars()["32-true"] = vars()["32"] = "32-true"  # aliases that are not valid Python names
    vars()["bf16-mixed"] = "bf16-mixed"

    @classmethod
    def _missing_(cls, value: object) -> "Precision | None":
        return cls.__members__.get(str(value))  # YAML reads 32 as a number


class Products(Enum):
    """How an SAE's decoder and backward pass are computed; the results agree up to rounding."""

    auto = "auto"
    dense = "dense"
    sparse = "sparse"


class Splitting(Enum):
    """Which SAEs are split by features over the devices."""

    auto = "auto"
    all = "all"
    none = "none"


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """Length, devices and precision of training; the `trainer` group."""

    tokens: int = 524_288
    """Training tokens in the whole run."""
    batch: int = 1024
    """Tokens per update."""
    accelerator: Accelerator = Accelerator.auto
    """Where the SAEs train; `llm.device` says where the LLM runs."""
    devices: Any = "auto"
    """Devices of one machine that train together, with a process each; auto is all visible GPUs,
    or 1 on a CPU. It may change when a run is resumed. The speed depends on it, and otherwise only
    rounding: of a split SAE, and of all SAEs unless `threads` is set."""
    nodes: int = 1
    """Machines with `devices` each; their processes are started by torchrun, srun or submitit."""
    split: Splitting = Splitting.auto
    """Which SAEs are split by features over all devices: auto (one that trains alone, or is too
    large for one device), all, or none. The others are shared out, each to one device."""
    threads: int | None = None
    """CPU threads of each process, on which the last bits of a result depend; null is
    OMP_NUM_THREADS if set, else torch's default, divided among the processes that the run starts.
    """
    patience: int = 600
    """Seconds without an answer after which a process takes another one for lost."""
    precision: Precision = Precision.auto
    """Matrix products of the SAE in fp32 or bf16; auto is bf16 where the hardware has it."""
    products: Products = Products.auto
    """dense (all features), sparse (those that are active on a token), or auto: for each SAE
    the faster one at the density of its last update."""
    log_every: int = 8
    """Updates between two points of a training curve."""
    checkpoint_every: int = 131_072
    """Tokens between two checkpoints; a killed run loses at most that many."""
    keep_every: int | None = None
    """Tokens between two SAEs that are kept as `sae-<tokens>/` beside `sae/`; null keeps only the
    last one. May change when a run is resumed."""

    def __post_init__(self):
        for name in ("tokens", "batch", "log_every", "checkpoint_every", "nodes", "patience"):
            _check_positive(f"trainer.{name}", getattr(self, name))
        if self.keep_every is not None:
            _check_positive("trainer.keep_every", self.keep_every, "give tokens, or null for none")
        if self.threads is not None:
            _check_positive("trainer.threads", self.threads, "give 1 or more, or null")
        if self.devices != "auto" and (type(self.devices) is not int or self.devices < 1):
            raise UserError(
                f"trainer.devices={self.devices}: give a number of devices, or auto; "
                "CUDA_VISIBLE_DEVICES=0,1 before the command says which"
            )
        if self.tokens < self.batch:
            raise UserError(
                f"trainer.tokens={self.tokens} is less than one batch: give at least "
                f"trainer.batch={self.batch}"
            )

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return self.tokens // self.batch

    @property
    def kept_saes(self) -> int:
        """Number of SAEs that `keep_every` keeps in the whole run."""
        # at most one after each update, however few tokens `keep_every` is
        return min(self.steps * self.batch // self.keep_every, self.steps) if self.keep_every else 0


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text; changes nothing about training."""

    every: int = 131_072
    """Training tokens between two evaluations; one more comes at the end."""
    tokens: int = 16_384
    """Held-out tokens for reconstruction and sparsity, rounded up to whole sequences."""
    loss_tokens: int = 4096
    """How many of the held-out tokens also measure the LLM's loss, by far the most expensive part;
    with 0 it is not measured, and the LM head and the blocks above the SAE's are not loaded."""

    def __post_init__(self):
        for name in ("every", "tokens"):
            _check_positive(f"eval.{name}", getattr(self, name))
        if self.loss_tokens < 0:
            raise UserError(
                f"eval.loss_tokens={self.loss_tokens}: give a positive number of tokens, or 0 to "
                "measure no loss of the LLM"
            )


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """Adam, its learning rate schedule and gradient clipping; the `optim` group."""

    lr: float = 1e-3
    """Peak learning rate."""
    bias_lr: float | None = None
    """Biases and thresholds of features learn this many times as fast as the weights; null for
    sqrt(d_in). Adam moves every parameter by about lr, and a pre-activation is the sum of d_in
    products but one bias: at equal rates the bias is too slow, and features hardly learn to be
    silent."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the square root of Adam's second moment."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    clip: float | None = 1.0
    """Largest norm of one SAE's gradient; null for no clipping."""

    def __post_init__(self):
        _check_positive("optim.lr", self.lr, "give a positive learning rate, such as 1e-3")
        _check_positive("optim.eps", self.eps)
        if self.bias_lr is not None:
            _check_positive("optim.bias_lr", self.bias_lr, "give a factor such as 1, or null")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: give a number >= 0 and < 1")
        _check_share("optim.warmup", self.warmup)
        _check_share("optim.decay", self.decay)
        if self.clip is not None:
            _check_positive(
                "optim.clip", self.clip, "give a positive norm, or null for no clipping"
            )


class Normalization(Enum):
    """How activations are normalised before the SAE reads them."""

    none = "none"
    scale = "scale"
    standardize = "standardize"


@dataclass(slots=True, kw_only=True)
class NormalizeConfig:
    """By default, activations are shifted and scaled to a mean square of 1 per element."""

    mode: Normalization = Normalization.standardize
    """standardize (subtract the mean, divide by one scalar), scale (divide only), or none."""
    tokens: int = 65_536
    """Tokens from which mean and scale are estimated (at most those in the shuffle pool)."""

    def __post_init__(self):
        _check_positive("callbacks.normalize.tokens", self.tokens)


@dataclass(slots=True, kw_only=True)
class ResampleConfig:
    """Dead features are restarted at inputs that are reconstructed badly (Anthropic 2023)."""

    every: int | None = None
    """Tokens between two resamplings; null, the default, for none."""
    until: float = 0.6
    """Share of the run after which no more features are resampled."""
    tokens: int = 8192
    """Tokens of the shuffle pool among which new directions are drawn."""

    def __post_init__(self):
        if self.every is not None:
            _check_positive("callbacks.resample.every", self.every, "give tokens, or null for none")
        _check_share("callbacks.resample.until", self.until)
        _check_positive("callbacks.resample.tokens", self.tokens)


@dataclass(slots=True, kw_only=True)
class CallbacksConfig:
    """Normalisation, resampling and dead features; the `callbacks` group."""

    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    """Normalisation of the activations."""
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    """Resampling of dead features."""
    dead_after: int | None = None
    """Tokens without firing after which a feature counts as dead; null for a 25th of the run, at
    most 10 M tokens (with a window longer than the run, no feature would ever be dead)."""

    def __post_init__(self):
        if self.dead_after is not None:
            _check_positive("callbacks.dead_after", self.dead_after, "give tokens, or null")

    def compute_dead_window(self, run_tokens: int) -> int:
        """Tokens without firing after which a feature counts as dead."""
        return self.dead_after or min(10_000_000, max(1, run_tokens // 25))
