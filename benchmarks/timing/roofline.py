"""How fast could it be? The LLM up to the hooked block and one dense encode, nothing else."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from timing.floor import floor, llm_floor
from timing.ours import jobs

from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import device, has_bf16, load
from sae_lightning.llm.sites import decoder_stack
from sae_lightning.runs.heap import keep_freed_memory

SECONDS = 3.0  # for which each of the two is repeated


def measure(run: list[str], folder: str) -> dict[str, Any]:
    """The rates of the encode's product and of the LLM on this machine, and the floor."""
    keep_freed_memory()  # as training does
    config = jobs([run], Path(folder))[0].config
    chosen = device(config.llm)
    number = torch.bfloat16 if has_bf16(chosen.type) else torch.float32
    llm = load(config.llm).model
    stack = decoder_stack(llm)
    site = config.layer.within(len(stack)).source
    width, features = llm.config.get_text_config().hidden_size, config.model.features
    batch, sequences, context = config.trainer.batch, config.llm.batch, config.data.context
    x = torch.randn(batch, width, device=chosen, dtype=number)
    weights = torch.randn(width, features, device=chosen, dtype=number)
    ids = torch.randint(1000, 30_000, (sequences, context))
    encode_seconds = _seconds(lambda: x @ weights)
    llm_seconds = _seconds(lambda: capture(llm, ids, [site]))
    flops = 2 * batch * width * features / encode_seconds
    blocks = sum(p.numel() for block in stack[: site.layer + 1] for p in block.parameters())
    encode, read = batch / encode_seconds, sequences * (context - 1) / llm_seconds
    return {
        "number": str(number).removeprefix("torch."),
        "flops": flops,
        "encode_tokens_per_second": encode,
        "llm_tokens_per_second": read,
        "llm_floor_tokens_per_second": llm_floor(flops, blocks),
        "llm_block_parameters": blocks,
        "floor_tokens_per_second": floor(read, encode),
    }


def _seconds(work: Callable[[], Any]) -> float:
    """The time of the fastest call: a floor is a bound."""
    times, enough = [], 0.0
    while enough < SECONDS or len(times) < 8:
        started = _now()
        work()
        times.append(_now() - started)
        enough += times[-1]
    return min(times)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()
