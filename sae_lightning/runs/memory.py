"""Estimates the memory of a pass before anything is loaded. Units: bytes."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import SitePair, distinct_sites
from sae_lightning.llm.splice import LOGIT_ROWS
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, count_parameters
from sae_lightning.sae.controls import Control
from sae_lightning.scoring.scorecard import MAX_TOKENS_AT_ONCE
from sae_lightning.training.settings import Accelerator

# Elements per token that a block keeps for its backward pass, as a multiple of the width. Measured
# in SmolLM2 with eager attention, at a context of 128, without gradients of weights.
KEPT_WIDTHS = 30
PROCESS_BYTES = 800_000_000  # Python with torch, transformers and lightning
EVALUATION_SHARE = 5 / 8  # in evaluation, a token takes at most this share of its training memory


class PassMemory(NamedTuple):
    """Memory of the SAEs that share a pass, in bytes."""

    shared_parts: dict[tuple[str, ...], int]
    """Memory that SAEs share, by the settings that it grows with: the shuffle pool, the LLM's
    weights and, because SAEs compute one after another, the activations of one SAE."""
    head_bytes: list[int]
    """Of each SAE: weights, gradients, Adam's state, and copies of decoder rows."""
    hidden_bytes: int
    """Of each SAE (equal for all): in evaluation, the LLM's last hidden states with the SAE."""

    def count_bytes(
        self, indices: Sequence[int], split: Collection[int] = (), ranks: int = 1
    ) -> int:
        """Memory of a rank that trains the SAEs with these indices; those in `split` are split over
        all `ranks`."""
        heads = (self.head_bytes[i] // (ranks if i in split else 1) for i in indices)
        return self.shared_bytes + sum(heads) + len(indices) * self.hidden_bytes

    @property
    def shared_bytes(self) -> int:
        """Memory that does not depend on the number of SAEs: the process and the shared parts."""
        return PROCESS_BYTES + sum(self.shared_parts.values())


def read_free_memory(config: Config) -> float:
    """Free memory for training: of the GPU or, on a CPU, the RAM that this process may use."""
    if config.trainer.accelerator is not Accelerator.cpu and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    available = psutil.virtual_memory().available
    return min(available, _read_free_in_cgroups(), _read_free_under_ulimit())


def _read_free_in_cgroups(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float:
    """Memory that a container or cluster job may still use: the minimum over its cgroup and the
    parent groups, for cgroup v1 and v2; infinite without a limit."""
    free = math.inf
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # v2, v1
            continue
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = mount / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such group, or no limit ("max")
                limit_bytes = int((folder / f"memory.{limit}").read_text())
                used_bytes = int((folder / f"memory.{used}").read_text())
                free = min(free, limit_bytes - used_bytes + _read_file_cache(folder))
    return free


def _read_file_cache(group: Path) -> int:
    """Page cache of a cgroup, which the system reclaims when memory runs short."""
    lines = (group / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in map(str.split, lines)}
    names = ("inactive_file", "active_file")  # in v1, `total_` includes child groups
    return sum(stat.get(f"total_{name}", stat[name]) for name in names)


def _read_free_under_ulimit() -> float:
    """Memory that `ulimit -v` leaves to this process; infinite without a limit."""
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # neither Linux nor FreeBSD
        return math.inf
    limit, _ = process.rlimit(psutil.RLIMIT_AS)
    return math.inf if limit == psutil.RLIM_INFINITY else limit - process.memory_info().vms


def estimate_memory(
    configs: Sequence[Config], sites: Sequence[SitePair], llm: LLMShape, ranks: int = 1
) -> PassMemory:
    """Memory per rank of a pass that trains SAEs with these configs at these sites. Each of the
    `ranks` holds one LLM batch of every rank at a time."""
    config = configs[0]
    parameter_counts = [
        count_parameters(c.model, *map(llm.width_at, pair))
        for c, pair in zip(configs, sites, strict=True)
    ]
    element_bytes = torch.finfo(getattr(torch, config.llm.dtype.name)).bits // 8
    llm_sites = distinct_sites(sites)
    data = config.data_source.estimate_data_memory(  # in rows or elements
        llm_sites, llm, config.eval.tokens, config.eval.loss_tokens
    )
    row_bytes = sum(map(llm.width_at, llm_sites)) * element_bytes
    # tokens whose strengths are in memory; one of evaluation counts as 5/8 of one in training
    tokens = max(config.trainer.batch, int(EVALUATION_SHARE * MAX_TOKENS_AT_ONCE))
    activation_bytes = [
        tokens * c.model.features * ARCHITECTURES[c.model.name].network.bytes_per_activation
        for c in configs
    ]
    export_bytes = (16 * n for n in parameter_counts)  # float64 weights, original and folded
    # of the SAE for which their sum is largest
    activations, export = max(zip(activation_bytes, export_bytes, strict=True), key=sum)
    warm_counts = [n for n, c in zip(parameter_counts, configs, strict=True) if c.model.start]
    shared_parts = {
        ("data.pool",): 2 * config.data.pool * row_bytes,  # copied for a checkpoint
        ("llm.batch",): ranks * data.rows * row_bytes,
        ("eval.tokens",): config.eval.tokens * row_bytes,
        ("llm.name",): data.shared * element_bytes,
        ("model.features", "trainer.batch"): activations,
        # a warm start's SAE takes 12 bytes a parameter while it is opened
        ("model.features",): export + 12 * max(warm_counts, default=0),
    }
    blocks_above = [  # blocks that the gradient of loss.kl passes through
        llm.layers - pair.target.layer for c, pair in zip(configs, sites, strict=True) if c.loss.kl
    ]
    if blocks_above:
        kept_elements = data.rows * max(blocks_above) * KEPT_WIDTHS * llm.width
        logit_elements = 8 * LOGIT_ROWS * llm.vocabulary  # about 8 arrays, as in evaluation
        shared_parts[("loss.kl", "llm.batch")] = (kept_elements + logit_elements) * element_bytes
    head_bytes = [_count_head_bytes(c, pair, llm) for c, pair in zip(configs, sites, strict=True)]
    return PassMemory(shared_parts, head_bytes, data.per_sae * element_bytes)


def _count_head_bytes(config: Config, sites: SitePair, llm: LLMShape) -> int:
    """Weights, gradients and Adam's two moments in fp32, and the weights in bf16. A warm start also
    keeps its first decoder rows in half precision, a soft-frozen decoder in fp32."""
    parameters = count_parameters(config.model, *map(llm.width_at, sites))
    total = 18 * parameters
    if config.model.start:
        total += parameters  # W_dec has about half of the parameters, and its copy 2 bytes for each
    elif config.model.control is Control.soft_frozen_decoder:
        total += 4 * config.model.features * llm.width_at(sites.target)
    return total


def check_memory(
    needed: PassMemory,
    configs: Sequence[Config],
    sites: Sequence[SitePair],
    llm: LLMShape,
    free: float,
    ranks: int = 1,
) -> None:
    """UserError if an SAE does not fit in the free memory even when it trains alone, split over
    `ranks`. `needed`: the memory of one pass with all SAEs; `free`: bytes for each rank."""
    if free < PROCESS_BYTES:
        raise UserError(
            f"{max(free, 0) / 1e9:.1f} GB of memory are free, and the libraries alone take "
            f"{PROCESS_BYTES / 1e9:.1f} GB: free some, or try all the same with sweep.max_heads=1"
        )
    for index, (config, pair) in enumerate(zip(configs, sites, strict=True)):
        # `needed` counts the shared parts of all SAEs: alone, this SAE needs at most that
        if needed.count_bytes([index], [index], ranks) <= free:
            continue
        alone = estimate_memory([config], [pair], llm, ranks)
        total = alone.count_bytes([0], [0], ranks)
        if total <= free:
            continue
        parts = Counter(alone.shared_parts)
        parts[("model.features",)] += alone.head_bytes[0] // ranks
        parts[("llm.batch",)] += alone.hidden_bytes
        ((names, largest),) = parts.most_common(1)
        settings = ", ".join(f"{name}={config.to_flat_dict()[name]}" for name in names)
        raise UserError(
            f"{settings}: training needs about {total / 1e9:.1f} GB of memory, "
            f"{largest / 1e9:.1f} GB of it for this. {free / 1e9:.1f} GB are free: lower it, "
            "or try all the same with sweep.max_heads=1"
        )
