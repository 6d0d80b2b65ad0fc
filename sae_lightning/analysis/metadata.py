"""Reads LLM and site from the metadata of an SAE whose folder has no config.yaml."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.formats.readers import OWN_KEY
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, SAE

# TransformerLens' model names, which SAELens uses -> names on the hub, where they differ.
HUB_NAMES = {
    "gpt2-small": "gpt2",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
}
HUB_OWNERS = {"gpt2-": "openai-community", "pythia-": "EleutherAI", "gemma-": "google"}
HUB_OWNERS |= {"Llama-": "meta-llama", "Qwen": "Qwen", "Mistral-": "mistralai"}
# Hook and module names of TransformerLens and transformers, with the block's index -> kind of site,
# and an offset of the index (resid_pre of a block is resid of the previous block).
HOOK_PATTERNS = {
    r"blocks\.(\d{1,6})\.hook_resid_post": (Kind.resid, 0),
    r"blocks\.(\d{1,6})\.hook_resid_pre": (Kind.resid, -1),
    r"blocks\.(\d{1,6})\.hook_attn_out": (Kind.attn, 0),
    r"blocks\.(\d{1,6})\.hook_mlp_out": (Kind.mlp, 0),
    r"blocks\.(\d{1,6})\.(?:ln2\.hook_normalized|mlp\.hook_in)": (Kind.mlp_in, 0),
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d{1,6})": (Kind.resid, 0),
    r"resid_post_layer_(\d{1,6})": (Kind.resid, 0),  # dictionary_learning
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d{1,6})\.mlp": (Kind.mlp, 0),
}


# Metadata keys that are read, and their types; our own keys take precedence.
METADATA_TYPES = {"model_name": str, "hook_name": str, "hook_name_out": str, "context_size": int}
OWN_METADATA_TYPES = dict.fromkeys(("llm.name", "llm.revision", "llm.bos", "llm.separator"), str)


def config_from_metadata(
    sae: SAE, run: str, settings: dict[str, Any], given_settings: Collection[str]
) -> Config:
    """Make the config of the SAE in the folder `run`: LLM, site and context come from its metadata
    unless named in `given_settings`, everything else from `settings` (llm, data, layer, seed).
    UserError if neither says what the SAE reads."""
    own = sae.metadata.get(OWN_KEY)
    merged = sae.metadata | (own if isinstance(own, dict) else {})
    types = METADATA_TYPES | OWN_METADATA_TYPES
    metadata = {key: merged[key] for key in types if merged.get(key) is not None}
    for key, value in metadata.items():
        if type(value) is not types[key]:
            kind = types[key].__name__
            raise UserError(f"{run}: {key}={value!r:.80} in its metadata is no {kind}")
    llm, data, layer = settings["llm"], settings["data"], settings["layer"]
    if not {"llm", "llm.name"} & {*given_settings}:
        own = {name.removeprefix("llm."): metadata.get(name) for name in OWN_METADATA_TYPES}
        llm = replace(llm, **own | {"name": _find_llm_name(metadata, run)})
    if not any(name.split(".")[0] == "layer" for name in given_settings):
        layer = _read_layer(metadata, run)
    if (
        "data.context" not in given_settings
        and "context_size" in metadata
        and hasattr(data, "context")
    ):
        data = replace(data, context=metadata["context_size"])
    loss = ARCHITECTURES[sae.config.name].loss()
    seed = settings["seed"]
    return Config(llm=llm, data=data, layer=layer, model=sae.config, loss=loss, seed=seed)


def _find_llm_name(metadata: dict[str, Any], run: str) -> str:
    if own := metadata.get("llm.name"):
        return own
    name = metadata.get("model_name")
    if not name:
        raise UserError(
            f"{run} does not say which LLM its SAE reads: give llm=... (a preset in conf/llm) or "
            "llm=hf llm.name=..."
        )
    if "/" in name:
        return name
    owner = next((owner for start, owner in HUB_OWNERS.items() if name.startswith(start)), None)
    return HUB_NAMES.get(name) or (f"{owner}/{name}" if owner else name)


def _read_layer(metadata: dict[str, Any], run: str) -> LayerConfig:
    source = _read_hook(metadata.get("hook_name"), run)
    target = _read_hook(metadata["hook_name_out"], run) if metadata.get("hook_name_out") else source
    if source[0] != target[0]:
        raise UserError(
            f"{run} reads block {source[0]} and writes block {target[0]}: only an SAE within one "
            "block can be analysed"
        )
    return LayerConfig(index=source[0], source=source[1], target=target[1])


def _read_hook(hook: str | None, run: str) -> tuple[int, Kind]:
    """Find the block index and the kind of site that a hook name stands for."""
    for pattern, (kind, offset) in HOOK_PATTERNS.items():
        match = hook and re.fullmatch(pattern, hook)
        if match and int(match[1]) + offset >= 0:
            return int(match[1]) + offset, kind
    problem = "does not say where its SAE reads"
    if hook:
        problem = f"reads {hook:.80}, which is not a known site"
    raise UserError(
        f"{run} {problem}: give the site with layer=... (resid, attn, mlp, transcoder) and "
        "layer.index=..."
    )
