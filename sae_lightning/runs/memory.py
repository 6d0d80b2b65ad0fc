"""How much memory a pass takes, estimated before anything is loaded. Units: bytes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from sae_lightning.llm.packaged import Shape
from sae_lightning.llm.sites import Sites, distinct
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, size
from sae_lightning.scoring.scorecard import ROWS
from sae_lightning.training.settings import Accelerator

PROCESS = 800_000_000  # Python with torch, transformers and lightning
EVALUATION = 5 / 8  # a token evaluated takes at most so much of what one in training takes


class Memory(NamedTuple):
    """What SAEs that share a pass take."""

    shared: int
    """LLM, shuffle pool, held-out activations, logits, and the features of the one SAE that
    computes at a time."""

    heads: list[int]
    """Of each SAE: weights, gradients and Adam's two moments in fp32, a copy in bf16, and the LLM's
    last hidden states with the SAE in place."""


def available(config: Config) -> float:
    """What is free where the SAEs train: on the GPU, or in this machine."""
    if config.trainer.accelerator is not Accelerator.cpu and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return min(psutil.virtual_memory().available, _left_in_cgroup())


def _left_in_cgroup() -> float:
    """What a container or a cluster's job may still take (cgroup v2)."""
    try:
        group = Path("/proc/self/cgroup").read_text().partition("::")[2].strip().lstrip("/")
        limit, used = (
            int((Path("/sys/fs/cgroup") / group / f"memory.{name}").read_text())
            for name in ("max", "current")
        )
    except (OSError, ValueError):  # another system, or no limit
        return math.inf
    return limit - used


def estimate(configs: Sequence[Config], sites: Sequence[Sites], llm: Shape) -> Memory:
    """The memory of a pass that trains SAEs with these configs at these sites."""
    config = configs[0]
    weights = [size(c.model, llm.width, llm.width) for c in configs]
    number = torch.finfo(getattr(torch, config.llm.dtype.name)).bits // 8
    read = distinct(sites)
    known = config.source.memory(read, llm, config.eval.tokens, config.eval.loss_tokens)
    # the pool is copied for a checkpoint
    rows = 2 * config.data.pool + known.rows + config.eval.tokens
    held = known.shared + rows * llm.width * len(read)
    # batches in training and evaluation, and the float64 in which an SAE is exported
    batch = max(config.trainer.batch, int(EVALUATION * ROWS))
    batches = [
        batch * c.model.features * ARCHITECTURES[c.model.name].network.bytes_per_activation
        for c in configs
    ]
    computing = max(size + 16 * n for size, n in zip(batches, weights, strict=True))
    hidden = known.per_sae * number
    return Memory(PROCESS + held * number + computing, [18 * n + hidden for n in weights])
