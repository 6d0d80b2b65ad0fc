"""Where a run's rows come from, and the key under which they are cached."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn

from sae_lightning.llm.capture import measure_branch_scale
from sae_lightning.llm.load import LLM, LLMConfig
from sae_lightning.llm.sites import Site
from sae_lightning.stream.cache import CachedRows
from sae_lightning.stream.flat import hash_tokenizer
from sae_lightning.stream.packing import TokenStream
from sae_lightning.stream.prefetch import PrefetchedRows
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.source import RowStream, TextConfig, make_absolute

CACHE_FORMAT = 2  # of the cache; another number is another key
HASHED_NUMBERS = 1 << 14  # numbers of a tensor that are looked at in their places
SUMMED_NUMBERS = 1 << 24  # numbers summed at a time, or their 64-bit copy may not fit in memory
INTEGERS_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def open_rows(
    config: LLMConfig,
    data: TextConfig,
    seed: int,
    llm: LLM,
    tokens: TokenStream,
    sites: Sequence[Site],
    resumed: bool = False,
    ahead: int = 0,
) -> RowStream:
    """The rows at `sites` as the settings describe them: from the LLM, or from the cache.

    On a GPU the LLM computes `ahead` rows while SAEs train, but not where it writes to a cache: the
    disk has to wait for it. A run that is not `resumed` ends with a UserError where there is no
    space for its cache.
    """
    rows = LLMRows(
        llm,
        tokens,
        sites,
        batch=config.batch,
        max_norm=data.max_norm,
        keep_special=data.keep_special,
    )
    if not data.cache:
        return PrefetchedRows(rows, ahead) if ahead and rows.device.type == "cuda" else rows
    known = identify_rows(config, data, seed, rows)
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    width = llm.model.config.get_text_config().hidden_size
    return CachedRows(rows, pick_cache_folder(data.cache_folder) / key, known, width, resumed)


def pick_cache_folder(chosen: str | None) -> Path:
    """Where caches lie: `data.cache_folder`, or a place of the user's."""
    if chosen is None:
        return platformdirs.user_cache_path("sae_lightning") / "activations"
    return Path(make_absolute(chosen))


def identify_rows(config: LLMConfig, data: TextConfig, seed: int, rows: LLMRows) -> dict[str, Any]:
    """All that decides what the rows are: settings, and what LLM and text are behind them.

    The LLM as it is loaded, device and libraries too, because others round otherwise. A shard holds
    all sites, and with `data.max_norm` they decide together which rows are dropped.
    """
    model, tokenizer = rows.llm.model, rows.llm.tokenizer
    text = {
        name: value
        for name, value in asdict(data).items()
        if name != "pool" and not name.startswith(("cache", "kind"))
    }
    special = {name: getattr(config, name) for name in ("bos", "separator")}
    return {
        "format": CACHE_FORMAT,
        "llm": {name: token for name, token in special.items() if token is not None}
        | {
            "name": config.name,
            "revision": config.revision,
            "batch": config.batch,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "attn": getattr(model.config, "_attn_implementation", None),
            "device": _processor(rows.device),
            "torch": str(torch.__version__),
            "transformers": importlib.metadata.version("transformers"),
            "weights": hash_llm(model),
            "tokenizer": hash_tokenizer(tokenizer)[:16],
        },
        "data": text | {"text": rows.tokens.fingerprint(), "files": data.files_hash()},
        "seed": seed,
        "sites": [_read(model, site) for site in rows.sites],
    }


def _read(model: nn.Module, site: Site) -> str:
    """A site, and what its branch is multiplied by; earlier versions did not do that."""
    times = measure_branch_scale(model, site)
    return str(site) if times == 1 else f"{times} {site}"


def _processor(device: torch.device) -> str:
    """What computes, by its name where it has one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = f" {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
    return device.type + capability


def hash_llm(model: nn.Module) -> str:
    """A hash of an LLM's architecture and, of each of its tensors, of the sum of all its bits and
    of evenly spread numbers."""
    about = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        about.pop(name, None)
    known = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        known.update(f"{name} {tuple(tensor.shape)}".encode())
        bits = tensor.flatten().view(INTEGERS_BY_SIZE[tensor.itemsize])
        known.update(bits[:: 1 + len(bits) // HASHED_NUMBERS].cpu().contiguous().numpy())
        total = sum(piece.sum(dtype=torch.int64) for piece in bits.split(SUMMED_NUMBERS))
        known.update(f"{int(total)}".encode())
    return known.hexdigest()[:16]
