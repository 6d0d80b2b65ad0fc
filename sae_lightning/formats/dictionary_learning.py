"""The format of dictionary_learning: a class for each architecture, no transcoders."""

import re

import torch

from sae_lightning.errors import UserError
from sae_lightning.formats.format import (
    LINEAR,
    PLAIN,
    Format,
    Layout,
    Origin,
    SavedFiles,
    SettingsAndTensors,
    StoredSAE,
    add_groups,
    check_readable,
    drop_nulls,
    rename_tensors,
)
from sae_lightning.llm.sites import Kind
from sae_lightning.sae import SAE

# dictionary_learning's names of sites
SUBMODULES = {
    Kind.resid: "resid_post",
    Kind.attn: "attn_out",
    Kind.mlp: "mlp_out",
    Kind.mlp_in: "mlp_in",
}


def read_dictionary_learning(files: SavedFiles) -> StoredSAE:
    """Read a folder of dictionary_learning; its SAEs take raw activations."""
    cfg, tensors = files.settings, files.tensors
    trainer = drop_nulls(cfg["trainer"])  # settings of training, which the metadata will include
    layouts, dict_class = DICTIONARY_LEARNING.layouts, trainer["dict_class"]
    check_readable(files.settings_file, "dict_class", dict_class, layouts)
    layout = layouts[dict_class]
    settings = {"name": layout.architecture}
    if layout.architecture in ("topk", "batch_topk", "matryoshka"):
        # k in the weights is final; training may have annealed it from the config's k
        settings["k"] = int(tensors.pop("k", trainer["k"]))
    if "group_sizes" in tensors:
        settings = add_groups(settings, tensors.pop("group_sizes").int().tolist())
    weights = rename_tensors(DICTIONARY_LEARNING, tensors)
    if layout.architecture == "topk":
        weights.pop("threshold", None)  # unused: each token has exactly k features
    hook, path = trainer.get("submodule_name"), str(files.settings_file.absolute())
    submodules = "|".join(SUBMODULES.values())  # a folder's name may give the site
    if hook is None and (match := re.search(rf"({submodules})_layer_\d+", path)):
        hook = match[0]
    if hook is None and "layer" in trainer:
        hook = f"resid_post_layer_{trainer['layer']}"
    metadata = {"model_name": trainer.get("lm_name"), "hook_name": hook}
    metadata["context_size"] = cfg.get("buffer", {}).get("ctx_len")
    return StoredSAE(settings, weights, drop_nulls(metadata) | trainer, layout.subtracts_b_dec)


def make_dictionary_learning_settings(sae: SAE, key: str, origin: Origin) -> SettingsAndTensors:
    """Make the settings of config.json, and tensors for k, the threshold and group sizes. UserError
    if the features of an SAE with k have different thresholds: the format stores one."""
    config, tensors, site = sae.config, {}, origin.sites and origin.sites.source
    trainer = {
        "dict_class": key,
        "activation_dim": len(sae.W_enc),
        "dict_size": config.features,
        "lm_name": origin.metadata.get("model_name"),
        "layer": site and site.layer,
        "submodule_name": site and f"{SUBMODULES[site.kind]}_layer_{site.layer}",
    }
    if hasattr(config, "k"):
        trainer["k"] = config.k
        tensors["k"] = torch.tensor(config.k, dtype=torch.int32)
        tensors["threshold"] = torch.tensor(-1.0)  # below 0: not set, as in a TopK
    if hasattr(sae, "threshold") and hasattr(config, "k"):
        tensors["threshold"] = sae.threshold[0].clone()
        if (sae.threshold != tensors["threshold"]).any():
            raise UserError(
                f"format=dictionary_learning stores one threshold in a {key}, and the features of "
                "this SAE have different ones"
            )
    if hasattr(config, "sizes"):
        tensors["group_sizes"] = torch.tensor(config.sizes())
    return {"trainer": trainer, "buffer": {"ctx_len": origin.metadata.get("context_size")}}, tensors


BIASED = LINEAR | {"b_dec": "b_dec"}
GATED = {
    "encoder.weight": "W_enc.T",
    "decoder.weight": "W_dec.T",
    "decoder_bias": "b_dec",
    "gate_bias": "b_enc",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
}
DICTIONARY_LEARNING = Format(
    files=("ae.pt", "config.json"),
    read=read_dictionary_learning,
    layouts={
        "AutoEncoder": Layout("relu", LINEAR | {"bias": "b_dec"}, subtracts_b_dec=True),
        "AutoEncoderNew": Layout("relu", LINEAR | {"decoder.bias": "b_dec"}),
        "AutoEncoderTopK": Layout("topk", BIASED, subtracts_b_dec=True),
        "BatchTopKSAE": Layout("batch_topk", BIASED, subtracts_b_dec=True),
        "MatryoshkaBatchTopKSAE": Layout("matryoshka", PLAIN, subtracts_b_dec=True),
        "JumpReluAutoEncoder": Layout("jumprelu", PLAIN | {"threshold": "threshold"}),
        "GatedAutoEncoder": Layout("gated", GATED, subtracts_b_dec=True),
    },
    autoencoders={
        "relu": "AutoEncoderNew",
        "dense": "AutoEncoderNew",
        "topk": "AutoEncoderTopK",
        "batch_topk": "BatchTopKSAE",
        "matryoshka": "MatryoshkaBatchTopKSAE",
        "jumprelu": "JumpReluAutoEncoder",
        "gated": "GatedAutoEncoder",
    },
    make_settings=make_dictionary_learning_settings,
)
