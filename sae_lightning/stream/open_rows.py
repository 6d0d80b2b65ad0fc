"""Opens a run's rows, from the LLM or the cache, and computes the key they are cached under."""

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
from sae_lightning.llm.placement import read_tensors
from sae_lightning.llm.sites import Site
from sae_lightning.ranks import world
from sae_lightning.stream.cache import CachedRows
from sae_lightning.stream.flat import hash_tokenizer
from sae_lightning.stream.local_files import make_absolute
from sae_lightning.stream.packing import TokenStream
from sae_lightning.stream.prefetch import PrefetchedRows
from sae_lightning.stream.rows import LLMRows
from sae_lightning.stream.shared import SharedRows
from sae_lightning.stream.source import RowStream, TextConfig

NEW_SETTINGS = ("chat", "assistant_only", "weights")  # unknown to earlier versions
UNHASHED_SETTINGS = ("pool", "cache", "cache_folder", "kind")  # rows do not depend on them
CACHE_FORMAT = 2  # part of the key, so that caches of older formats are not used
HASHED_NUMBERS = 1 << 14  # elements of a tensor that are hashed, at most
SUMMED_NUMBERS = 1 << 24  # elements summed at a time: a 64-bit copy of all may not fit in memory
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
    own_sites: Sequence[Site] | None = None,
) -> RowStream:
    """Open the rows at `sites`: from the LLM, or from the cache if `data.cache` is set.

    With several ranks, which run the LLM in turn, this one gets the rows at `own_sites` (None: at
    all). On a GPU without a cache, `ahead` rows are prefetched while SAEs train. If the disk is too
    full for the cache, a new run fails at the first `next`; a `resumed` one adds nothing to it."""
    settings = {
        "batch": config.batch,
        "max_norm": data.max_norm,
        "keep_special": data.keep_special,
    }
    if world().size == 1:
        rows = LLMRows(llm, tokens, sites, **settings)
    else:
        writes_cache = data.cache and world().is_rank_zero  # with the rows at all sites
        needed = sites if own_sites is None or writes_cache else own_sites
        rows = SharedRows(llm, tokens, sites, own_sites=needed, **settings)
    if not data.cache:
        return PrefetchedRows(rows, ahead) if ahead and rows.device.type == "cuda" else rows
    identity = identify_rows(config, data, seed, rows)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    width = llm.model.config.get_text_config().hidden_size
    folder = pick_cache_folder(data.cache_folder) / key
    return CachedRows(rows, folder, identity, width, resumed, own_sites)


def pick_cache_folder(cache_folder: str | None) -> Path:
    """Pick the folder that holds all caches: `data.cache_folder`, or one in the user's cache folder
    if that is None."""
    if cache_folder is None:
        return platformdirs.user_cache_path("sae_lightning") / "activations"
    return Path(make_absolute(cache_folder))


def identify_rows(config: LLMConfig, data: TextConfig, seed: int, rows: LLMRows) -> dict[str, Any]:
    """Collect everything that determines the rows: settings, the loaded LLM, and the text.

    Device and library versions are included, because rounding depends on them, and the sites,
    because a shard holds the rows at all sites."""
    model, tokenizer = rows.llm.model, rows.llm.tokenizer
    settings = asdict(data)
    for name in UNHASHED_SETTINGS:
        del settings[name]
    for name in NEW_SETTINGS:  # left out if they are off, so that older caches keep their key
        if not settings.get(name):
            settings.pop(name, None)
    special_tokens = {"bos": config.bos, "separator": config.separator}
    return {
        "format": CACHE_FORMAT,
        "llm": {name: token for name, token in special_tokens.items() if token is not None}
        | {
            "name": config.name,
            "revision": config.revision,
            "batch": config.batch,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "attn": getattr(model.config, "_attn_implementation", None),
            "device": _name_processor(rows.device),
            "torch": str(torch.__version__),
            "transformers": importlib.metadata.version("transformers"),
            "weights": hash_llm(model),
            "tokenizer": hash_tokenizer(tokenizer)[:16],
        }
        | ({"load": config.load} if config.load else {}),
        "data": settings | {"text": rows.token_stream.fingerprint(), "files": data.hash_files()},
        "seed": seed,
        "sites": [_name_site(model, site) for site in rows.sites],
    }


def _name_site(model: nn.Module, site: Site) -> str:
    """Name a site, with the factor by which the LLM scales the output there. Earlier versions
    cached these activations unscaled, under the plain name."""
    scale = measure_branch_scale(model, site)
    return str(site) if scale == 1 else f"{scale} {site}"


def _name_processor(device: torch.device) -> str:
    """Name the GPU, or the kind of device and the CPU's capability."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = f" {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
    return device.type + capability


def hash_llm(model: nn.Module) -> str:
    """Hash an LLM's config and, for each tensor, some evenly spaced elements and the sum of all
    elements' bits."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        for part in read_tensors(model, name, tensor):
            bits = part.flatten().view(INTEGERS_BY_SIZE[part.itemsize])
            digest.update(bits[:: 1 + len(bits) // HASHED_NUMBERS].cpu().contiguous().numpy())
            total = sum(piece.sum(dtype=torch.int64) for piece in bits.split(SUMMED_NUMBERS))
            digest.update(f"{int(total)}".encode())
    return digest.hexdigest()[:16]
