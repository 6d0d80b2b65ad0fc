"""The formats of llamascopium and of Llama Scope, an earlier one by the same authors."""

import math
from typing import Any

import torch

from sae_lightning.errors import UserError
from sae_lightning.formats.format import (
    LINEAR,
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
from sae_lightning.sae import SAE

MEAN_NORMS = "dataset_average_activation_norm"


def read_llamascopium(files: SavedFiles) -> StoredSAE:
    """Read an SAE or transcoder of llamascopium (also as published in Llama Scope R1).

    llamascopium trains on activations scaled to a mean norm of sqrt(d), and chooses features by
    z * n: pre-activation times norm of the decoder row. UserError if the mean norm is not saved.
    """
    cfg, tensors = files.settings, dict(files.tensors)
    activation, norm_setting = _check_settings(files)
    hooks = [cfg["hook_point_in"], cfg.get("hook_point_out", cfg["hook_point_in"])]
    mean_norms = _pop_mean_norms(tensors) | cfg.get(MEAN_NORMS, {})  # by hook, or `in` and `out`
    weights = rename_tensors(LLAMASCOPIUM, tensors)
    if not cfg.get("use_decoder_bias", True):
        weights["b_dec"] = torch.zeros(weights["W_dec"].shape[1])
    scales = [1.0, 1.0]
    if norm_setting == "dataset-wise":
        site_norms = [
            mean_norms.get(side, mean_norms.get(hook))
            for hook, side in zip(hooks, ("in", "out"), strict=True)
        ]
        if any(norm is None for norm in site_norms):
            raise UserError(
                f"{files.settings_file}: norm_activation='dataset-wise', but no mean norm is "
                f'saved: add "{MEAN_NORMS}": {{"in": ..., "out": ...}} to this file'
            )
        scales = [compute_scale(norm, weights["W_dec"].shape[1]) for norm in site_norms]
    uses_decoder_norms = cfg.get("sparsity_include_decoder_norm", True)
    if activation == "jumprelu" and uses_decoder_norms:
        n = weights["W_dec"].norm(dim=1).clamp(min=1e-8)
        weights["threshold"] = weights.pop("log_threshold").exp() / n  # z * n > t where z > t / n
    settings = {"name": LLAMASCOPIUM.layouts[activation].architecture}
    if activation == "topk":
        settings["k"] = cfg["top_k"]
    metadata = {"model_name": cfg.get("model_name"), "hook_name": hooks[0]}
    if hooks[1] != hooks[0]:
        metadata["hook_name_out"] = hooks[1]
    return StoredSAE(
        settings,
        weights,
        drop_nulls(metadata) | cfg,
        scale_in=scales[0],
        scale_out=scales[1],
        rescale=activation == "topk" and uses_decoder_norms,  # the top k of z * n
    )


def _check_settings(files: SavedFiles) -> tuple[str, str]:
    """The settings `act_fn` and `norm_activation`; UserError if one is not supported."""
    cfg, file = files.settings, files.settings_file
    check_readable(file, "sae_type", cfg.get("sae_type", "sae"), ["sae"])
    activation, norm_setting = cfg.get("act_fn", "relu"), cfg.get("norm_activation", "dataset-wise")
    check_readable(file, "act_fn", activation, LLAMASCOPIUM.layouts)
    check_readable(file, "norm_activation", norm_setting, ["dataset-wise", "inference"])
    if cfg.get("use_glu_encoder"):
        raise UserError(f"{file}: use_glu_encoder is not supported")
    return activation, norm_setting


def _pop_mean_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hook -> mean norm of the activations there, removed from `tensors`."""
    names = [name for name in tensors if name.startswith(f"{MEAN_NORMS}.")]
    return {name.removeprefix(f"{MEAN_NORMS}."): tensors.pop(name) for name in names}


def compute_scale(norm: Any, d: int) -> float:
    """The factor that scales activations of width `d` and mean norm `norm` to a mean norm of
    sqrt(d); ValueError unless `norm` is positive and finite."""
    norm = float(norm)
    if not 0 < norm < math.inf:
        raise ValueError(f"{MEAN_NORMS} is {norm} and should be positive")
    return math.sqrt(d) / norm


def make_llamascopium_settings(sae: SAE, key: str, origin: Origin) -> SettingsAndTensors:
    """Make the settings of config.json; `norm_activation="inference"` says that weights take raw
    activations."""
    sites, d, features = origin.require_sites(), len(sae.W_enc), sae.config.features
    factor = features / d
    while int(d * factor) < features:  # as llamascopium computes the number of features
        factor = math.nextafter(factor, math.inf)
    return {
        "sae_type": "sae",
        "d_model": d,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "act_fn": key,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "top_k": getattr(sae.config, "k", 50),  # without a k, the number has no effect
        "hook_point_in": sites.source.hook_name,
        "hook_point_out": sites.target.hook_name,
        "use_glu_encoder": False,
        "model_name": origin.metadata.get("model_name"),
    }, {}


THRESHOLD = "activation_function.log_jumprelu_threshold"
SCOPIUM_NAMES = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
# Our architecture -> key in `layouts`. Outside training, BatchTopK and Matryoshka have a fixed
# threshold, as a JumpReLU has.
SCOPIUM_KEYS = {"relu": "relu", "dense": "relu", "topk": "topk", "jumprelu": "jumprelu"}
SCOPIUM_KEYS |= {"batch_topk": "jumprelu", "matryoshka": "jumprelu"}
LLAMASCOPIUM = Format(
    files=("sae_weights.safetensors", "config.json"),
    read=read_llamascopium,
    layouts={
        "relu": Layout("relu", SCOPIUM_NAMES),
        "topk": Layout("topk", SCOPIUM_NAMES),
        "jumprelu": Layout("jumprelu", SCOPIUM_NAMES | {THRESHOLD: "log_threshold"}),
    },
    aliases=LINEAR | {"decoder.bias": "b_dec", "log_jumprelu_threshold": "log_threshold"},
    autoencoders=SCOPIUM_KEYS,
    transcoders=SCOPIUM_KEYS,
    make_settings=make_llamascopium_settings,
)


def read_llama_scope(files: SavedFiles) -> StoredSAE:
    """Read a folder of Llama Scope, trained on Llama-3.1-8B. As in SAELens, a feature fires where
    z > scale_in * jump_relu_threshold (z: pre-activation, without the decoder norm)."""
    cfg = files.settings
    check_readable(files.settings_file, "act_fn", cfg.get("act_fn", "jumprelu"), ["jumprelu"])
    weights = rename_tensors(LLAMA_SCOPE, files.tensors)
    norms = cfg[MEAN_NORMS]
    scale_in, scale_out = (
        compute_scale(norms[side], weights["b_dec"].numel()) for side in ("in", "out")
    )
    weights["threshold"] = torch.tensor(float(cfg["jump_relu_threshold"]) * scale_in)
    metadata = {"model_name": "meta-llama/Llama-3.1-8B", "hook_name": cfg["hook_point_in"]}
    if cfg.get("hook_point_out", metadata["hook_name"]) != metadata["hook_name"]:
        metadata["hook_name_out"] = cfg["hook_point_out"]
    subtracts_b_dec = cfg.get("apply_decoder_bias_to_pre_encoder", False)
    return StoredSAE({"name": "jumprelu"}, weights, metadata, subtracts_b_dec, scale_in, scale_out)


LLAMA_SCOPE = Format(
    files=("checkpoints/final.safetensors", "hyperparams.json"),
    read=read_llama_scope,
    layouts={"jumprelu": Layout("jumprelu", LINEAR | {"decoder.bias": "b_dec"})},
)
