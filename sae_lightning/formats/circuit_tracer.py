"""circuit-tracer's format: a folder with a transcoder for every block."""

import re

from sae_lightning.errors import UserError
from sae_lightning.formats.format import (
    PLAIN,
    Format,
    Layout,
    Origin,
    SavedFiles,
    SettingsAndTensors,
    StoredSAE,
    check_readable,
    drop_nulls,
    rename_tensors,
)
from sae_lightning.llm.sites import HOOK_NAMES
from sae_lightning.sae import SAE


def read_circuit_tracer(files: SavedFiles) -> StoredSAE:
    """Read one transcoder of a set; config.yaml beside it names the sites and the LLM."""
    cfg, block = files.settings, re.search(r"layer_(\d+)", files.weights_file.name)
    model_kind = cfg.get("model_kind", "transcoder_set")
    check_readable(files.settings_file, "model_kind", model_kind, ["transcoder_set"])
    tensors = dict(files.tensors)
    k = tensors.pop("k", None)  # stored by some TopKs; others have k in config.yaml
    weights = rename_tensors(CIRCUIT_TRACER, tensors)
    architecture = "jumprelu" if "threshold" in weights else "relu"
    metadata = {"model_name": cfg.get("model_name")}
    for side, metadata_key in (("input", "hook_name"), ("output", "hook_name_out")):
        if block and (hook := cfg.get(f"feature_{side}_hook")):
            metadata[metadata_key] = f"blocks.{block[1]}.{hook}"
    settings = {"name": architecture, "skip": "W_skip" in weights}
    if cfg.get("activation") == "topk" or k is not None:
        settings |= {"name": "topk", "k": cfg["k"] if k is None else int(k)}
    return StoredSAE(settings, weights, drop_nulls(metadata))


def make_circuit_tracer_settings(sae: SAE, key: str, origin: Origin) -> SettingsAndTensors:
    """Make the settings of config.yaml, the same for every block; `key` is the SAE's in `layouts`.
    Versions of circuit-tracer before April 2026 ignore `activation` and read a TopK as a ReLU.
    UserError if sites or LLM are unknown."""
    sites, model = origin.require_sites(), origin.metadata.get("model_name")
    if model is None:
        raise UserError("format=circuit_tracer: config.yaml names the LLM; give llm.name=...")
    settings = {
        "model_kind": "transcoder_set",
        "model_name": model,
        "feature_input_hook": HOOK_NAMES[sites.source.kind],
        "feature_output_hook": HOOK_NAMES[sites.target.kind],
        "scan": f"{model.split('/')[-1]}-transcoders",
    }
    if key == "topk":
        settings |= {"activation": "topk", "k": sae.config.k}
    return settings, {}


TRACER_NAMES = PLAIN | {"W_enc": "W_enc.T", "W_skip": "W_skip.T"}
CIRCUIT_TRACER = Format(
    files=("layer_*.safetensors",),
    optional=("config.yaml",),
    read=read_circuit_tracer,
    layouts={
        "relu": Layout("relu", TRACER_NAMES),
        "topk": Layout("topk", TRACER_NAMES),
        "jumprelu": Layout(
            "jumprelu", TRACER_NAMES | {"activation_function.threshold": "threshold"}
        ),
    },
    transcoders={"relu": "relu", "dense": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    # `dense` is a ReLU trained without a sparsity penalty; outside training, BatchTopK and
    # Matryoshka have a fixed threshold, as a JumpReLU has
    | {"batch_topk": "jumprelu", "matryoshka": "jumprelu"},
    make_settings=make_circuit_tracer_settings,
)
