"""Where a run's rows come from, and the key under which they are cached."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn

from sae_lightning.llm.load import LLM, LLMConfig
from sae_lightning.llm.sites import Site
from sae_lightning.stream.base import RowSource
from sae_lightning.stream.cache import CachedRows
from sae_lightning.stream.flat import tokenizer_hash
from sae_lightning.stream.packing import TokenSource
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.text import DataConfig

FORMAT = 1  # of the cache; another number is another key
SAMPLE = 1 << 14  # numbers of a tensor that tell it from another


def open_rows(
    config: LLMConfig,
    data: DataConfig,
    seed: int,
    llm: LLM,
    tokens: TokenSource,
    sites: Sequence[Site],
) -> RowSource:
    """The rows at `sites` as the settings describe them: from the LLM, or from the cache."""
    rows = LLMRows(
        llm,
        tokens,
        sites,
        batch=config.batch,
        max_norm=data.max_norm,
        keep_special=data.keep_special,
    )
    if not data.cache:
        return rows
    known = settings(config, data, seed, rows)
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    width = llm.model.config.get_text_config().hidden_size
    return CachedRows(rows, cache_folder(data.cache_folder) / key, known, width)


def cache_folder(chosen: str | None) -> Path:
    """Where caches lie: `data.cache_folder`, or a place of the user's."""
    if chosen is None:
        return platformdirs.user_cache_path("sae_lightning") / "activations"
    return Path(chosen).expanduser().absolute()


def settings(config: LLMConfig, data: DataConfig, seed: int, rows: LLMRows) -> dict[str, Any]:
    """All that decides what the rows are: settings, and what LLM and text are behind them.

    The LLM as it is loaded, device too, because another kind of device rounds otherwise. With
    `data.max_norm` all sites together decide which rows are dropped.
    """
    model, tokenizer = rows.llm.model, rows.llm.tokenizer
    text = {
        name: value
        for name, value in asdict(data).items()
        if name != "pool" and not name.startswith("cache")
    }
    return {
        "format": FORMAT,
        "llm": {
            "name": config.name,
            "revision": config.revision,
            "batch": config.batch,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "attn": getattr(model.config, "_attn_implementation", None),
            "device": rows.device.type,
            "weights": llm_fingerprint(model),
            "tokenizer": tokenizer_hash(tokenizer)[:16],
        },
        "data": text | {"text": rows.tokens.fingerprint()},
        "seed": seed,
        "sites": None if data.max_norm is None else [str(site) for site in rows.sites],
    }


def llm_fingerprint(model: nn.Module) -> str:
    """A hash of an LLM's architecture and of evenly spread numbers of each of its tensors."""
    about = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        about.pop(name, None)
    known = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        known.update(f"{name} {tuple(tensor.shape)}".encode())
        sample = tensor.flatten()[:: 1 + tensor.numel() // SAMPLE]
        known.update(sample.cpu().contiguous().view(torch.uint8).numpy())
    return known.hexdigest()[:16]
