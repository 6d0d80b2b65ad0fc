"""How much memory a pass takes, estimated before anything is loaded. Units: bytes."""

from collections.abc import Sequence

import psutil
import torch

from sae_lightning.config import Config
from sae_lightning.llm.load import parameters, shape
from sae_lightning.llm.packaged import Shape
from sae_lightning.llm.sites import Site
from sae_lightning.scorecard import ROWS
from sae_lightning.training.settings import Accelerator

PROCESS = 800_000_000  # Python with torch, transformers and lightning


def available(config: Config) -> int:
    """What is free where the SAEs train: on the GPU, or in this machine."""
    if config.trainer.accelerator is not Accelerator.cpu and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def of_head(config: Config, llm: Shape) -> int:
    """What one more SAE adds: weights, gradients and Adam's two moments in fp32, a bf16 copy."""
    return 18 * _weights(config, llm)


def of_pass(configs: Sequence[Config], sites: Sequence[Site], llm: Shape) -> int:
    """What a pass takes besides its SAEs' own: LLM, shuffle pool, held-out activations, logits,
    and the features of the one SAE that computes at a time."""
    config = configs[0]
    number = torch.finfo(getattr(torch, config.llm.dtype.name)).bits // 8
    slack = config.llm.batch * config.data.context
    tokens = config.data.pool + slack + config.eval.tokens
    logits = 2 * slack * llm.vocabulary
    computing = max(
        # training; evaluation in fp32; folding in float64 for export
        max(16 * c.trainer.batch * c.model.features, 8 * ROWS * c.model.features)
        + 16 * _weights(c, llm)
        for c in configs
    )
    held = parameters(config.llm) + tokens * llm.width * len(set(sites)) + logits
    return PROCESS + held * number + computing


def fitting(configs: Sequence[Config], sites: Sequence[Site]) -> tuple[int, int]:
    """How many SAEs like the largest of these fit on one pass (at least 1), and the memory free."""
    llm = shape(configs[0].llm)
    free = available(configs[0])
    left = 0.9 * free - of_pass(configs, sites, llm)
    return max(1, int(left // max(of_head(config, llm) for config in configs))), free


def needed(configs: Sequence[Config], sites: Sequence[Site]) -> int:
    """The memory of a pass with these SAEs."""
    llm = shape(configs[0].llm)
    return of_pass(configs, sites, llm) + sum(of_head(config, llm) for config in configs)


def _weights(config: Config, llm: Shape) -> int:
    features = config.model.features
    return 2 * llm.width * features + features + llm.width
