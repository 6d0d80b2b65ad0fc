"""Makes the config of an SAE whose folder has no config.yaml: LLM and site are in its metadata."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.formats.trained_on import (
    check_metadata,
    choose_llm,
    describe_missing_norm_gain,
    read_layer,
)
from sae_lightning.llm.load import NO_LLM
from sae_lightning.runs.config import Config
from sae_lightning.sae import ARCHITECTURES, SAE
from sae_lightning.terminal import console


def config_from_metadata(
    sae: SAE, run: str, settings: dict[str, Any], given_settings: Collection[str]
) -> Config:
    """Make the config of the SAE in the folder `run`: LLM, site and context come from its metadata
    unless named in `given_settings`, everything else from `settings` (llm, data, layer, seed).
    UserError if neither metadata nor given settings say what the SAE reads."""
    metadata = check_metadata(sae.metadata, run)
    llm, data, layer = settings["llm"], settings["data"], settings["layer"]
    llm = choose_llm(llm, metadata, run, given_settings)
    # the llm in `settings` is NO_LLM if the user gave data=activations and the path of the files
    if llm.name == NO_LLM and settings["llm"].name != NO_LLM:
        raise UserError(
            f"{run} was trained on activations without an LLM, and does not say where they are: "
            "give the run folder that it is from, or, if an LLM made them, name it and a text with "
            "llm=... data=... layer.index=..."
        )
    if not any(name.split(".")[0] == "layer" for name in given_settings):
        layer = read_layer(metadata, run)
        if warning := describe_missing_norm_gain(metadata, run):
            console.print(warning)
    is_text = hasattr(data, "context")
    if is_text and "context_size" in metadata and "data.context" not in given_settings:
        data = replace(data, context=metadata["context_size"])
    loss, seed = ARCHITECTURES[sae.config.name].loss(), settings["seed"]
    return Config(llm=llm, data=data, layer=layer, model=sae.config, loss=loss, seed=seed)
