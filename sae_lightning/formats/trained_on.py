"""Reads from the metadata of an SAE which LLM and site it belongs to."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.formats.format import Origin
from sae_lightning.formats.saelens import OWN_KEY
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, LayerConfig, Site, SitePair

# Metadata keys that are read, and their types: SAELens' keys, and settings of our Config.
METADATA_TYPES = {"model_name": str, "hook_name": str, "hook_name_out": str, "context_size": int}
METADATA_TYPES |= {"model.control": str}
LLM_SETTING_TYPES = dict.fromkeys(("llm.name", "llm.revision", "llm.bos", "llm.separator"), str)

# TransformerLens' model names, which SAELens uses -> names on the hub, where they differ.
HUB_NAMES = {
    "gpt2-small": "gpt2",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
}
# Beginning of another model name without an owner -> its owner on the hub.
HUB_OWNERS = {"gpt2-": "openai-community", "pythia-": "EleutherAI", "gemma-": "google"}
HUB_OWNERS |= {"Llama-": "meta-llama", "Qwen": "Qwen", "Mistral-": "mistralai"}
# Hook names of TransformerLens and paths of modules in transformers -> kind of site, and an offset
# to the block's index in the name: resid_pre is resid of the previous block.
HOOK_PATTERNS = {
    r"blocks\.(\d{1,6})\.hook_resid_post": (Kind.resid, 0),
    r"blocks\.(\d{1,6})\.hook_resid_pre": (Kind.resid, -1),
    r"blocks\.(\d{1,6})\.hook_attn_out": (Kind.attn, 0),
    r"blocks\.(\d{1,6})\.hook_mlp_out": (Kind.mlp, 0),
    r"blocks\.(\d{1,6})\.(?:ln2\.hook_normalized|mlp\.hook_in)": (Kind.mlp_in, 0),
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d{1,6})": (Kind.resid, 0),
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d{1,6})\.mlp": (Kind.mlp, 0),
    r"(?:.*\.)?(?:h|layers|blocks)\.(\d{1,6})\.(?:self_attn|attn|attention)": (Kind.attn, 0),
    # dictionary_learning
    r"resid_post_layer_(\d{1,6})": (Kind.resid, 0),
    r"att\w*_out_layer_(\d{1,6})": (Kind.attn, 0),
    r"mlp_out_layer_(\d{1,6})": (Kind.mlp, 0),
    r"mlp_in_layer_(\d{1,6})": (Kind.mlp_in, 0),
    # Gemma Scope 2
    r"model\.layers\.(\d{1,6})\.output": (Kind.resid, 0),
    r"model\.layers\.(\d{1,6})\.post_feedforward_layernorm\.output": (Kind.mlp, 0),
    r"model\.layers\.(\d{1,6})\.pre_feedforward_layernorm\.output": (Kind.mlp_in, 0),
}
# Hook names of places that are not our sites -> a description.
OTHER_HOOKS = {
    r".*(?:hook_z|o_proj\.input)": "the attention before its output projection",
    r"blocks\.0\.hook_resid_pre|hook_embed": "the input of the first block",
}
# Metadata keys that are written in other tools' formats, and their types.
WRITTEN_TYPES = METADATA_TYPES | {"hf_hook_name": str, "hf_hook_name_out": str}
WRITTEN_TYPES |= {"dataset_path": str, "prepend_bos": bool, OWN_KEY: dict}


def find_origin(metadata: dict[str, Any], address: str, layer: LayerConfig | None) -> Origin:
    """Make the Origin of the SAE at `address` from its metadata, without values of a wrong type;
    `layer`, if given, replaces the sites in the metadata."""
    checked = {k: metadata[k] for k, t in WRITTEN_TYPES.items() if type(metadata.get(k)) is t}
    sites, problem = None, ""
    try:
        if not layer and (warning := describe_missing_norm_gain(checked, address)):
            raise UserError(f"{warning}; give layer=transcoder layer.index=... to write that site")
        chosen = layer or read_layer(checked, address)
        source = Site(chosen.index, chosen.source)
        sites = SitePair(source, Site(chosen.index, chosen.target or chosen.source))
        for key in ("hook_name", "hook_name_out"):
            checked.pop(key, None)
            if layer:  # hf_hook_name names the module at the site that is replaced
                checked.pop(f"hf_{key}", None)
        checked |= sites.hook_names
    except UserError as error:
        problem = str(error)
    return Origin(checked, sites, problem)


def check_metadata(metadata: dict[str, Any], address: str) -> dict[str, Any]:
    """The metadata of the SAE at `address` under the keys that are read; UserError if a value has
    a wrong type."""
    config = metadata.get(OWN_KEY)
    merged = metadata | (config if isinstance(config, dict) else {})
    types = METADATA_TYPES | LLM_SETTING_TYPES
    checked = {key: merged[key] for key in types if merged.get(key) is not None}
    for key, value in checked.items():
        if type(value) is not types[key]:
            name = types[key].__name__
            raise UserError(f"{address}: {key}={value!r:.80} in its metadata is not of type {name}")
    return checked


def choose_llm(
    llm: LLMConfig, metadata: dict[str, Any], address: str, typed_names: Collection[str]
) -> LLMConfig:
    """Take the LLM's name, revision, BOS and separator from the checked `metadata` of the SAE at
    `address`, but keep those of `llm` that the user typed (`typed_names`). All of `llm` is kept if
    an LLM was typed."""
    if {"llm", "llm.name"} & {*typed_names}:
        return llm
    settings = {name: metadata.get(name) for name in LLM_SETTING_TYPES}
    settings["llm.name"] = find_llm_name(metadata, address)
    changes = {name: value for name, value in settings.items() if name not in typed_names}
    return replace(llm, **{name.removeprefix("llm."): value for name, value in changes.items()})


def find_llm_name(metadata: dict[str, Any], address: str) -> str:
    """The hub's name of the LLM that the SAE at `address` reads; UserError if the metadata have
    none."""
    if llm_name := metadata.get("llm.name"):
        return llm_name
    name = metadata.get("model_name")
    if not name:
        raise UserError(
            f"{address} does not say which LLM its SAE reads: give llm=... (a preset in conf/llm) "
            "or llm=hf llm.name=..."
        )
    if "/" in name:
        return name
    owner = next((owner for start, owner in HUB_OWNERS.items() if name.startswith(start)), None)
    return HUB_NAMES.get(name) or (f"{owner}/{name}" if owner else name)


def read_layer(metadata: dict[str, Any], address: str) -> LayerConfig:
    """The sites of the SAE at `address`; UserError if they are unknown, or lie in two blocks."""
    source_name, target_name = metadata.get("hook_name"), metadata.get("hook_name_out")
    block, source = _read_hook(source_name, address)
    target_block, target = _read_hook(target_name, address) if target_name else (block, source)
    if block != target_block:
        raise UserError(
            f"{address} reads block {block} and writes block {target_block}: only an SAE within "
            "one block can be analysed"
        )
    return LayerConfig(index=block, source=source, target=target)


def describe_missing_norm_gain(metadata: dict[str, Any], address: str) -> str | None:
    """A warning that the SAE at `address` was trained on the MLP's input without the gain (the
    weights) of the norm before it, as TransformerLens computes it; None otherwise."""
    hook = metadata.get("hook_name") or ""
    if not hook.endswith("ln2.hook_normalized"):
        return None
    return (
        f"{address} reads {hook:.80}, the MLP's input without the norm's gain: on the MLP's input "
        "its numbers are wrong, unless that gain is 1"
    )


def _read_hook(hook: str | None, address: str) -> tuple[int, Kind]:
    """Find the block index and the kind of site that a hook name stands for; UserError if it is
    missing, or stands for none of our sites."""
    for pattern, (kind, offset) in HOOK_PATTERNS.items():
        match = hook and re.fullmatch(pattern, hook)
        if match and int(match[1]) + offset >= 0:  # the input of block 0 is no site of ours
            return int(match[1]) + offset, kind
    for pattern, meaning in OTHER_HOOKS.items():
        if hook and re.fullmatch(pattern, hook):
            raise UserError(
                f"{address} reads {hook:.80}, which is not a site of this project: it is "
                f"{meaning}. load_sae opens the SAE, but no task can run an LLM on it"
            )
    problem = "does not say where its SAE reads"
    if hook:
        problem = f"reads {hook:.80}, which is not a known site"
    raise UserError(
        f"{address} {problem}: give the site with layer=... (resid, attn, mlp, transcoder) and "
        "layer.index=..."
    )
