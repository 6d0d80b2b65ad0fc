"""Reads SAELens' format, in which this project saves its own SAEs, too."""

from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.formats.format import (
    Format,
    Layout,
    SavedFiles,
    StoredSAE,
    add_groups,
    check_readable,
    read_settings_file,
    rename_tensors,
)
from sae_lightning.sae import ARCHITECTURES

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"  # in training checkpoints: the scale of the activations
NOTE_KEY = "note"  # key in the metadata for a warning that SAELens misreads the SAE
OWN_KEY = "sae_lightning"  # key in cfg.json for our SAEConfig, and in the metadata for our Config

# (architecture, has a skip connection) -> SAELens' name of the transcoder
TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
# SAELens' architecture -> ours. Its batchtopk names occur only in training checkpoints.
SAELENS_ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# Beginnings of names of LLMs with LayerNorm, the only ones that center_writing_weights affects.
LAYERNORM_MODELS = ("gpt2", "distilgpt2", "pythia", "tiny-stories", "gelu-", "gpt-neo", "opt-")


def read_saelens(files: SavedFiles) -> StoredSAE:
    """Read a folder that SAELens 2 or later saved, for inference or as a training checkpoint, or
    that this project saved."""
    cfg = files.settings
    is_saelens_2 = "hook_point" in cfg  # hook_name since SAELens 3
    if is_saelens_2:
        cfg = {"hook_name": cfg["hook_point"]} | cfg
    # SAELens 3 to 5 have no architecture topk, but an activation function topk
    cfg = {"architecture": "standard", "activation_fn": cfg.get("activation_fn_str", "relu")} | cfg
    if cfg["activation_fn"] == "topk":
        kwargs = cfg["activation_fn_kwargs"]  # {"k": ...}
        cfg |= {"architecture": "topk", "activation_fn": "relu"} | kwargs
    architecture = cfg["architecture"]
    if OWN_KEY in cfg:
        settings = _check_own_settings(files.settings_file, cfg[OWN_KEY])
    else:
        settings = _translate_settings(files.settings_file, cfg)
    scale = _read_scale(files.settings_file, cfg.get("normalize_activations") or "none")
    weights = rename_tensors(SAELENS, files.tensors)
    metadata = cfg.get("metadata", cfg)  # older versions write it among the settings
    # SAELens' defaults, where keys are missing; SAELens 2 had center_writing_weights=True
    subtracts_b_dec = "transcoder" not in architecture and cfg.get("apply_b_dec_to_input", True)
    options = metadata.get("model_from_pretrained_kwargs", {})
    has_layernorm = str(metadata.get("model_name")).startswith(LAYERNORM_MODELS)
    if has_layernorm and options.get("center_writing_weights", is_saelens_2):
        weights |= _fold_mean_subtraction(weights, subtracts_b_dec)
    return StoredSAE(
        settings,
        weights,
        metadata,
        subtracts_b_dec=subtracts_b_dec,
        scale_in=scale,
        scale_out=scale,
        rescale=cfg.get("rescale_acts_by_decoder_norm", "batchtopk" in architecture),
    )


def _fold_mean_subtraction(weights: dict[str, Tensor], subtracts_b_dec: bool) -> dict[str, Tensor]:
    """Convert the encoder of an SAE that was trained on x - mean(x), the mean over dimensions, to
    raw x: (x - mean(x)) @ W_enc = x @ (W_enc - W_enc.mean(0)). TransformerLens subtracts mean(x)
    with `center_writing_weights`."""
    W_enc, b_enc = weights["W_enc"], weights["b_enc"]
    if subtracts_b_dec:  # load_sae will subtract b_dec @ (new W_enc); correct it to b_dec @ W_enc
        b_enc = b_enc - weights["b_dec"].mean() * W_enc.sum(dim=0)
    return {"W_enc": W_enc - W_enc.mean(dim=0), "b_enc": b_enc}


def _check_own_settings(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this project wrote; UserError if the architecture or a setting is
    unknown."""
    entry = ARCHITECTURES.get(settings["name"])
    if entry is None:
        raise UserError(
            f"{file}: there is no architecture {settings['name']} here; add the plugin that "
            "brings it, plugins=[...] (in Python: import it), or update"
        )
    if unknown := settings.keys() - {field.name for field in fields(entry.config)}:
        key = min(unknown)
        raise UserError(
            f"{file}: {OWN_KEY}.{key}={settings[key]} was written by another version: update, or "
            f"remove the key {OWN_KEY} to read the SAE as SAELens does"
        )
    return settings


def _translate_settings(file: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Translate SAELens' settings into ours."""
    architecture = cfg["architecture"]
    check_readable(file, "architecture", architecture, SAELENS_ARCHITECTURES)
    check_readable(file, "activation_fn", cfg["activation_fn"], ["relu"])
    settings = {"name": SAELENS_ARCHITECTURES[architecture], "skip": "skip" in architecture}
    if "topk" in architecture:
        # SAELens' default is 100; k of its BatchTopK may be fractional
        settings["k"] = max(1, round(cfg.get("k", 100)))
    if architecture == "matryoshka_batchtopk":
        ends = [0, *cfg["matryoshka_widths"]]
        settings = add_groups(settings, [end - start for start, end in pairwise(ends)])
    return settings


def _read_scale(file: Path, normalisation: str | bool) -> float:
    """The factor by which SAELens multiplies activations; 1 if they are not scaled.
    UserError if it cannot be folded into the weights, or is not saved."""
    if normalisation == "none":
        return 1.0
    setting = f"{file}: normalize_activations={normalisation}"
    if normalisation not in (True, "expected_average_only_in"):  # True in old versions
        raise UserError(
            f"{setting} cannot be folded into the weights; only expected_average_only_in can"
        )
    scaler = file.with_name(SCALER)
    factor = read_settings_file(scaler).get("scaling_factor") if scaler.is_file() else None
    if factor is None:
        raise UserError(
            f"{setting}, but the factor is not saved: fold it in with SAELens "
            "(sae.fold_activation_norm_scaling_factor) and save again"
        )
    return factor


SAELENS = Format(
    files=(WEIGHTS, CFG),
    optional=(SCALER,),
    read=read_saelens,
    layouts={name: Layout(ours) for name, ours in SAELENS_ARCHITECTURES.items()},
    # all other tensors have our names
    aliases={"b_gate": "b_enc", "W_skip": "W_skip.T", "topk_threshold": "threshold"},
)
