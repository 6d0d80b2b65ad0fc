"""Folders that hold an SAE, whoever wrote them: which file holds the weights tells the format."""

import json
from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import read_regular_file
from sae_lightning.formats.pickles import load_tensors
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream.states import expect

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
NOTE_KEY = "note"  # the key of the metadata under which we say what SAELens makes of it
OWN_KEY = "sae_lightning"  # the key in cfg.json under which we describe the SAE ourselves

# kind, with a skip connection -> SAELens' name of the transcoder
TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
# SAELens' name of a kind -> ours. The two batch kinds are only in its checkpoints.
SAELENS_KINDS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
}
SAELENS_KINDS |= {name: SAELENS_KINDS[kind] for (kind, _), name in TRANSCODERS.items()}
# dictionary_learning's class -> ours, and whether its encoder reads x - b_dec
DICTIONARIES = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batch_topk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "GatedAutoEncoder": ("gated", True),
}
# All of their names of tensors that are not ours; the second group is stored transposed.
TENSOR_NAMES = {
    "b_gate": "b_enc",
    "encoder.bias": "b_enc",
    "gate_bias": "b_enc",
    "mag_bias": "b_mag",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
}
TRANSPOSED_TENSORS = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "W_skip": "W_skip"}


class StoredSAE(NamedTuple):
    """An SAE as a folder tells it, under our names."""

    settings: dict[str, Any]
    """Of the architecture's config, with its name."""
    weights: dict[str, Tensor]
    """By name, in float32."""
    metadata: dict[str, Any]
    """What it was trained on."""
    centred: bool = False
    """The encoder reads x - b_dec (a skip connection reads x)."""


def _read_json(file: Path) -> dict[str, Any]:
    return _drop_nulls(json.loads(read_regular_file(file)))


def _drop_nulls(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are null: not given."""
    return {key: value for key, value in settings.items() if value is not None}


def _check_readable(source: Path, key: str, value: Any, readable: Iterable[str]) -> None:
    """UserError unless `value`, given for `key` in `source`, is one of those that can be read."""
    if value not in readable:
        raise UserError(
            f"{source}: {key} {value!r} is not one that this version reads ({', '.join(readable)})"
        )


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """ValueError unless all are tensors of real and finite numbers; it names the tensor, and how
    many are not."""
    for name, x in tensors.items():
        expect(x, Tensor, name)
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: {x.numel():,} numbers are of type {kind}, not real")
        if x.nbytes > x.untyped_storage().nbytes():  # one number can be told to fill a memory
            raise ValueError(f"{name} is larger than what is stored of it")
        if wrong := int((~x.float().isfinite()).sum()):
            raise ValueError(f"{name}: {wrong:,} of {x.numel():,} numbers are not finite")


def _rename_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, in our orientation, in float32."""
    check_numbers(tensors)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    turned = {
        ours: tensors.pop(name).T for name, ours in TRANSPOSED_TENSORS.items() if name in tensors
    }
    return {TENSOR_NAMES.get(name, name): tensor for name, tensor in tensors.items()} | turned


def _add_groups(settings: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Settings of a Matryoshka with groups of these sizes; one group alone is a BatchTopK."""
    if len(sizes) == 1:
        return settings | {"name": "batch_topk"}
    return settings | {"groups": [size / sum(sizes) for size in sizes[:-1]]}


def read_saelens(file: Path) -> StoredSAE:
    """SAELens since version 3, saved for inference or in the midst of training; and this project
    (see export.py)."""
    source = file.with_name(CFG)
    cfg, weights = _read_json(source), _rename_tensors(load_file(file))
    # versions 3 to 5 had other words for TopK
    cfg = {"architecture": "standard", "activation_fn": cfg.get("activation_fn_str", "relu")} | cfg
    if cfg["activation_fn"] == "topk":
        cfg |= {"architecture": "topk", "activation_fn": "relu"} | cfg["activation_fn_kwargs"]
    kind = cfg["architecture"]
    settings = (
        _read_own_settings(source, cfg[OWN_KEY])
        if OWN_KEY in cfg
        else _translate_settings(source, cfg)
    )
    scale = _read_scale(source, cfg.get("normalize_activations") or "none")
    rescale = cfg.get("rescale_acts_by_decoder_norm", "batchtopk" in kind)
    centred = "transcoder" not in kind and cfg.get("apply_b_dec_to_input", True)
    weights = _fold(weights, scale, rescale)
    return StoredSAE(settings, weights, cfg.get("metadata", cfg), centred)


def _read_own_settings(source: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that this project wrote; what a newer version added has a meaning unknown here."""
    kind = ARCHITECTURES.get(settings["name"])
    known = {field.name for field in fields(kind.config)} if kind else settings.keys() - {"name"}
    if unknown := settings.keys() - known:
        key = min(unknown)
        raise UserError(
            f"{source}: {OWN_KEY}.{key}={settings[key]} is of another version: update, or take the "
            f"key {OWN_KEY} out to read the SAE as SAELens does"
        )
    return settings


def _translate_settings(source: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Settings of ours that say what SAELens' say."""
    kind = cfg["architecture"]
    _check_readable(source, "architecture", kind, SAELENS_KINDS)
    _check_readable(source, "activation_fn", cfg["activation_fn"], ["relu"])
    settings = {"name": SAELENS_KINDS[kind], "skip": "skip" in kind}
    if "topk" in kind:
        # 100 is what SAELens takes where none is given; its BatchTopK may have half of a feature
        settings["k"] = max(1, round(cfg.get("k", 100)))
    if kind == "matryoshka_batchtopk":
        ends = [0, *cfg["matryoshka_widths"]]
        settings = _add_groups(settings, [end - start for start, end in pairwise(ends)])
    return settings


def _fold(weights: dict[str, Tensor], scale: float, rescale: bool) -> dict[str, Tensor]:
    """SAELens' weights, made for activations x scale, as they are for raw ones.

    With `rescale`, features are compared and told in units of their decoder's norm; the threshold
    of a batch is in these units, and so moves with the scale. A threshold of -1, where training
    never set it, is no bound to relu(z).
    """
    if (weights.get("scaling_factor", torch.zeros(1)) == 1).all():
        del weights["scaling_factor"]  # of versions before 6; at 1 without effect
    weights["W_enc"] = weights["W_enc"] * scale
    weights["W_dec"], weights["b_dec"] = weights["W_dec"] / scale, weights["b_dec"] / scale
    if rescale:
        norms = weights["W_dec"].norm(dim=1).clamp(min=1e-8)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    if "topk_threshold" in weights:
        threshold = weights.pop("topk_threshold") / (scale if rescale else 1)
        weights["threshold"] = threshold.clamp(min=0).expand_as(weights["b_enc"])
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    return weights


def _read_scale(source: Path, normalisation: str | bool) -> float:
    """The factor by which SAELens multiplies activations: 1 where it is folded in already."""
    if normalisation == "none":
        return 1.0
    given = f"{source}: normalize_activations={normalisation}"
    if normalisation not in (True, "expected_average_only_in"):
        raise UserError(
            f"{given} cannot be folded into the weights; only expected_average_only_in can"
        )
    beside = source.with_name("activation_scaler.json")  # in checkpoints
    factor = _read_json(beside).get("scaling_factor") if beside.is_file() else None
    if factor is None:
        raise UserError(
            f"{given}, but its factor is not saved: fold it in with SAELens "
            "(sae.fold_activation_norm_scaling_factor) and save again"
        )
    return factor


def read_sparsify(file: Path) -> StoredSAE:
    """sparsify, SAEs and transcoders; all are TopK."""
    cfg, tensors = _read_json(file.with_name(CFG)), load_file(file)
    activation = "signed topk" if cfg.get("signed") else cfg.get("activation", "topk")
    if activation != "topk":
        raise UserError(
            f"{file.with_name(CFG)}: activation {activation!r} cannot be read; only topk"
        )
    settings = {"name": "topk", "k": cfg["k"], "skip": "W_skip" in tensors}
    return StoredSAE(
        settings, _rename_tensors(tensors), cfg, centred=not cfg.get("transcode", False)
    )


def read_dictionary_learning(file: Path) -> StoredSAE:
    """dictionary_learning, whose scale of activations is folded in already."""
    source = file.with_name("config.json")
    cfg = _read_json(source)
    trainer = _drop_nulls(cfg["trainer"])
    _check_readable(source, "dict_class", trainer["dict_class"], DICTIONARIES)
    name, centred = DICTIONARIES[trainer["dict_class"]]
    tensors = load_tensors(file)
    settings = {"name": name}
    if name in ("topk", "batch_topk", "matryoshka"):
        # among the weights is the last one, to which training may have come down from the other
        settings["k"] = int(tensors.pop("k", trainer["k"]))
    if "group_sizes" in tensors:
        settings = _add_groups(settings, tensors.pop("group_sizes").int().tolist())
    weights = _rename_tensors(tensors)
    if name == "topk":
        weights.pop("threshold", None)  # a by-product; each token has its k features
    elif "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp(min=0).expand_as(weights["b_enc"])
    about = {
        "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "context_size": cfg.get("buffer", {}).get("ctx_len"),
    }
    return StoredSAE(settings, weights, about | trainer, centred)


FORMATS = {
    WEIGHTS: read_saelens,  # and cfg.json
    "sae.safetensors": read_sparsify,  # and cfg.json
    "ae.pt": read_dictionary_learning,  # and config.json
}
