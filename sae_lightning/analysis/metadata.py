"""What an SAE that lies in no run folder says that it reads, in the words of another tool."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.formats.readers import OWN_KEY
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, SAE

# TransformerLens' names, by which SAELens knows models, that are not the hub's.
HUB_NAMES = {
    "gpt2-small": "gpt2",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
}
HUB_OWNERS = {"gpt2-": "openai-community", "pythia-": "EleutherAI", "gemma-": "google"}
HUB_OWNERS |= {"Llama-": "meta-llama", "Qwen": "Qwen", "Mistral-": "mistralai"}
# TransformerLens' and transformers' names of a place -> what is read there, and how many blocks on.
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


# What is asked of the metadata, and its type; of a run's settings, which count more, the LLM.
METADATA_TYPES = {"model_name": str, "hook_name": str, "hook_name_out": str, "context_size": int}
OWN_METADATA_TYPES = dict.fromkeys(("llm.name", "llm.revision", "llm.bos", "llm.separator"), str)


def config_from_metadata(
    sae: SAE, run: str, asked: dict[str, Any], given: Collection[str]
) -> Config:
    """The settings in the metadata of an SAE in the folder `run`, with those of `asked` (llm, data,
    layer, seed) that are `given` by name instead. UserError where nothing says what it reads."""
    own = sae.metadata.get(OWN_KEY)
    said = sae.metadata | (own if isinstance(own, dict) else {})
    metadata = {
        key: said[key] for key in METADATA_TYPES | OWN_METADATA_TYPES if said.get(key) is not None
    }
    for key, value in metadata.items():
        kind = (METADATA_TYPES | OWN_METADATA_TYPES)[key]
        if type(value) is not kind:
            raise UserError(f"{run}: {key}={value!r:.80} in its metadata is no {kind.__name__}")
    llm, data, layer = asked["llm"], asked["data"], asked["layer"]
    if not {"llm", "llm.name"} & {*given}:
        own = {name.removeprefix("llm."): metadata.get(name) for name in OWN_METADATA_TYPES}
        llm = replace(llm, **own | {"name": _find_llm_name(metadata, run)})
    if not any(name.split(".")[0] == "layer" for name in given):
        layer = _read_layer(metadata, run)
    if "data.context" not in given and "context_size" in metadata and hasattr(data, "context"):
        data = replace(data, context=metadata["context_size"])
    loss = ARCHITECTURES[sae.config.name].loss()
    return Config(llm=llm, data=data, layer=layer, model=sae.config, loss=loss, seed=asked["seed"])


def _find_llm_name(metadata: dict[str, Any], run: str) -> str:
    if own := metadata.get("llm.name"):
        return own
    name = metadata.get("model_name")
    if not name:
        raise UserError(
            f"{run} does not say which LLM its SAE reads: give llm=... (of those in conf/llm) or "
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
            "block can be looked at"
        )
    return LayerConfig(index=source[0], source=source[1], target=target[1])


def _read_hook(hook: str | None, run: str) -> tuple[int, Kind]:
    for pattern, (kind, on) in HOOK_PATTERNS.items():
        found = hook and re.fullmatch(pattern, hook)
        if found and int(found[1]) + on >= 0:
            return int(found[1]) + on, kind
    told = f"reads {hook:.80}, which is not a place that is known here" if hook else "does not say"
    raise UserError(
        f"{run} {told}: say where its SAE reads with layer=... (resid, attn, mlp, transcoder) and "
        "layer.index=..."
    )
