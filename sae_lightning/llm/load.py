"""A frozen language model and its tokenizer: packaged, from a local folder or from the hub."""

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file
from sae_lightning.llm.packaged import PACKAGED, LLMShape, dequantise, find_gguf_folder
from sae_lightning.llm.placement import check_arguments_of_load
from sae_lightning.llm.pretrained import (
    build_without_weights,
    check_quantisation,
    read_config,
    read_model,
    read_tokenizer,
)
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.sites import Site, find_site_module
from sae_lightning.terminal import phase

NO_LLM = "none"  # `llm.name` with kinds of data that need no LLM


class Dtype(Enum):
    """Dtype of the LLM's weights and activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(Enum):
    """Implementation of the LLM's attention; stream/text_source.py resolves `auto`."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


@dataclass(slots=True, kw_only=True)
class LLMConfig:
    """The language model whose activations are read."""

    name: str
    """`smollm2` (packaged), a local folder, or a name on the hub; `none` for data=synthetic and
    data=activations."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; null is its main branch."""

    dtype: Dtype = Dtype.auto
    """Number format; auto is bfloat16 where the processor or GPU supports it, else float32."""

    device: str = "auto"
    """cpu, cuda, cuda:N or mps; auto is cuda if there is one, then mps, then cpu. With a device map
    in llm.load, where the activations go."""

    load: dict[str, Any] = field(default_factory=dict)
    """Arguments for transformers' `from_pretrained`, for an LLM larger than one device:
    `llm.load.device_map=auto`, max_memory, offload_folder, quantization_config and a few more."""

    attn: Attention = Attention.auto
    """Attention implementation; auto is eager where that is faster (bfloat16 on a CPU, at most 256
    tokens of context), else sdpa if the model supports it."""

    trust_remote_code: bool = False
    """Allow Python code that comes with a hub model to run on this machine."""

    batch: int = 16
    """Sequences per forward pass."""

    bos: str | None = None
    """The token that starts every sequence; null is the tokenizer's or the model's BOS."""

    separator: str | None = None
    """The token between two documents; null is the tokenizer's or the model's EOS. Like other
    special tokens, it and BOS are left out of training, unless data.keep_special."""

    def __post_init__(self):
        if self.batch < 1:
            raise UserError(f"llm.batch={self.batch}: sequences per forward pass; give 1 or more")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(
                f"llm.device={self.device}: unknown; choose auto, cpu, cuda, cuda:N or mps"
            )
        if not self.name:
            raise UserError("llm.name=: empty; give smollm2, a hub name or a local folder")
        check_arguments_of_load(self.load)
        for setting in ("bos", "separator"):
            if getattr(self, setting) == "":
                raise UserError(f"llm.{setting}=: empty; give a token, or leave it out")
        if self.revision and (self.name in PACKAGED or _find_local_folder(self.name)):
            raise UserError(
                f"llm.revision={self.revision}: only a model on the hub has revisions, and "
                f"{self.name} is on this machine; leave it out"
            )


# at most one tokenizer; key: the settings of its LLM and the times when its files were changed
_last_tokenizer: dict[str, Any] = {}


class LLM(NamedTuple):
    """A frozen language model and its tokenizer."""

    model: nn.Module
    """The causal LM: frozen, in eval mode, on its device."""
    tokenizer: Any
    """Its tokenizer (transformers)."""
    name: str
    """llm.name as configured."""


def pick_device(config: LLMConfig) -> torch.device:
    """The device that `llm.device` stands for; UserError if this machine has no such device."""
    if config.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"llm.device={config.device}: this machine has {count or 'no'} CUDA device"
            f"{'s' if count > 1 else ''}; use llm.device=auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("llm.device=mps: this machine has no MPS device; use llm.device=auto")
    return device


def pick_dtype(config: LLMConfig) -> torch.dtype:
    """The dtype that `llm.dtype` stands for on this machine; without an LLM, auto is float32."""
    if config.dtype is not Dtype.auto:
        return getattr(torch, config.dtype.value)
    if config.name == NO_LLM:
        return torch.float32
    return torch.bfloat16 if has_bf16(pick_device(config).type) else torch.float32


def has_bf16(device_type: str) -> bool:
    """Whether this machine's devices of a type (cpu, cuda, ...) compute in bfloat16 natively."""
    match device_type:
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        case _:
            return False


def read_llm_shape(config: LLMConfig) -> LLMShape:
    """Dimensions of the LLM, from its config alone (no weight is read)."""
    if config.name in PACKAGED:
        find_gguf_folder(config.name)  # UserError if it is not installed
        return PACKAGED[config.name].shape
    with phase(f"looking up LLM {config.name}"), mute_libraries():
        hf_config = read_config(config, _find_local_folder(config.name)).get_text_config()
    return LLMShape(
        layers=hf_config.num_hidden_layers,
        width=hf_config.hidden_size,
        context=getattr(hf_config, "max_position_embeddings", None),
        vocabulary=hf_config.vocab_size,
    )


def count_llm_parameters(config: LLMConfig, blocks: int | None = None) -> int:
    """Number of parameters that `load_llm` would read with these `blocks`, from the LLM's config
    alone; 0 without an LLM."""
    if config.name == NO_LLM:
        return 0
    if config.name in PACKAGED:
        return PACKAGED[config.name].parameters_of(blocks)
    with mute_libraries():
        hf_config = read_config(config, _find_local_folder(config.name))
        model = build_without_weights(config, hf_config, blocks)
    return sum(p.numel() for p in model.parameters())


def check_sites(config: LLMConfig, sites: Collection[Site]) -> None:
    """UserError if the LLM lacks one of `sites`; builds the LLM without weights."""
    if config.name in PACKAGED:
        return  # packaged LLMs have all sites
    with mute_libraries():
        model = build_without_weights(config, read_config(config, _find_local_folder(config.name)))
    for site in sites:
        find_site_module(model, site)


def check_load(config: LLMConfig) -> None:
    """UserError for a quantisation in `llm.load` that cannot work here; loads nothing."""
    if "quantization_config" in config.load and config.name not in PACKAGED:
        with mute_libraries():
            check_quantisation(config, read_config(config, _find_local_folder(config.name)))


def find_hub_name(config: LLMConfig) -> str:
    """The LLM's name on the hub if it is known, else `llm.name`."""
    if config.name in PACKAGED:
        return PACKAGED[config.name].hub
    folder = _find_local_folder(config.name)
    # written by transformers up to version 4
    hub = folder and json.loads(read_regular_file(folder / "config.json")).get("_name_or_path")
    return hub if hub and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub) else config.name


def load_tokenizer(config: LLMConfig):
    """The LLM's tokenizer (transformers), without loading the LLM. The last tokenizer is
    kept, because the checks of a run load it before the run does. It is read again if the settings
    or the files of a local folder have changed."""
    folder = dequantise(config.name) if config.name in PACKAGED else _find_local_folder(config.name)
    # a broken link does not exist and has no time
    files = [file for file in folder.iterdir() if file.exists()] if folder else []
    times = sorted((file.name, file.stat().st_mtime_ns) for file in files)
    key = repr((config, times))
    if key not in _last_tokenizer:
        with mute_libraries():
            tokenizer = read_tokenizer(config, folder, read_config(config, folder))
        _last_tokenizer.clear()
        _last_tokenizer[key] = tokenizer
    return _last_tokenizer[key]


def load_llm(config: LLMConfig, blocks: int | None = None, tokenizer: Any = None) -> LLM:
    """The LLM in eval mode, without gradients, and its tokenizer.

    `blocks`: load only the first `blocks` blocks, without the LM head; None for the whole LLM.
    `tokenizer`: its tokenizer, if it is loaded already.
    """
    device, dtype = pick_device(config), pick_dtype(config)
    folder = dequantise(config.name) if config.name in PACKAGED else _find_local_folder(config.name)
    try:
        with phase(f"loading LLM {config.name}"), mute_libraries():
            hf_config = read_config(config, folder)
            tokenizer = tokenizer or read_tokenizer(config, folder, hf_config)
            model = read_model(config, folder, hf_config, blocks, dtype, device)
    except UserError as error:
        # an error that begins with llm.name is about the files, not about another setting
        if config.name not in PACKAGED or not str(error).startswith("llm.name"):
            raise
        raise UserError(
            f"llm.name={config.name}: {folder} is damaged; delete it, and it will be made again"
        ) from error
    model = model.eval().requires_grad_(False)
    return LLM(model=model, tokenizer=tokenizer, name=config.name)


def _find_local_folder(name: str) -> Path | None:
    """The local folder that `llm.name` names, or None."""
    path = os.path.expanduser(name)  # pathlib raises for ~nobody and for long names
    return Path(path) if os.path.isdir(path) else None
