"""Reads LLM and site from the metadata of an SAE whose folder has no config.yaml."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.formats.saelens import OWN_KEY
from sae_lightning.formats.trained_on import find_llm_name, read_layer
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, SAE

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
        llm = replace(llm, **own | {"name": find_llm_name(metadata, run)})
    if not any(name.split(".")[0] == "layer" for name in given_settings):
        layer = read_layer(metadata, run)
    if (
        "data.context" not in given_settings
        and "context_size" in metadata
        and hasattr(data, "context")
    ):
        data = replace(data, context=metadata["context_size"])
    loss = ARCHITECTURES[sae.config.name].loss()
    seed = settings["seed"]
    return Config(llm=llm, data=data, layer=layer, model=sae.config, loss=loss, seed=seed)
