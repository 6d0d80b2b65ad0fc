"""Reads SAE folders of all supported tools; the name of the weights file tells the format."""

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
NOTE_KEY = "note"  # key in the metadata: how SAELens misreads the SAE
OWN_KEY = "sae_lightning"  # key in cfg.json: the settings in our own terms

# (architecture, has a skip connection) -> SAELens' name of the transcoder
TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
# SAELens' architecture -> ours. Its batchtopk names occur only in training checkpoints.
SAELENS_KINDS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
}
SAELENS_KINDS |= {name: SAELENS_KINDS[kind] for (kind, _), name in TRANSCODERS.items()}
# dictionary_learning's class -> (our architecture, whether the encoder reads x - b_dec)
DICTIONARIES = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batch_topk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "GatedAutoEncoder": ("gated", True),
}
# Tensor names of all tools -> ours; TRANSPOSED_TENSORS are renamed and also transposed.
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
    """The content of an SAE folder under our names."""

    settings: dict[str, Any]
    """Fields of the architecture's config, including its name."""
    weights: dict[str, Tensor]
    """Name -> float32 tensor."""
    metadata: dict[str, Any]
    """What the SAE was trained on."""
    centred: bool = False
    """The encoder reads x - b_dec (a skip connection reads x)."""


def _read_json(file: Path) -> dict[str, Any]:
    return _drop_nulls(json.loads(read_regular_file(file)))


def _drop_nulls(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop settings that are null, which means not given."""
    return {key: value for key, value in settings.items() if value is not None}


def _check_readable(source: Path, key: str, value: Any, readable: Iterable[str]) -> None:
    """UserError unless `value`, given for `key` in the file `source`, is in `readable`."""
    if value not in readable:
        raise UserError(f"{source}: {key} {value!r} is not supported ({', '.join(readable)})")


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """ValueError unless all tensors are floating-point and finite; it names the tensor and counts
    the numbers that are not finite."""
    for name, x in tensors.items():
        expect(x, Tensor, name)
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}: {x.numel():,} numbers are of type {kind}, not floating-point"
            )
        if x.nbytes > x.untyped_storage().nbytes():  # a stride of 0 could expand to any size
            raise ValueError(f"{name} is larger than its storage")
        if wrong := int((~x.float().isfinite()).sum()):
            raise ValueError(f"{name}: {wrong:,} of {x.numel():,} numbers are not finite")


def _rename_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors to our names, our orientation and float32."""
    check_numbers(tensors)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    transposed = {
        ours: tensors.pop(name).T for name, ours in TRANSPOSED_TENSORS.items() if name in tensors
    }
    return {TENSOR_NAMES.get(name, name): tensor for name, tensor in tensors.items()} | transposed


def _add_groups(settings: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Settings of a Matryoshka SAE with groups of these sizes; with a single group it is a
    BatchTopK."""
    if len(sizes) == 1:
        return settings | {"name": "batch_topk"}
    return settings | {"groups": [size / sum(sizes) for size in sizes[:-1]]}


def read_saelens(file: Path) -> StoredSAE:
    """Read a folder written by SAELens 3 or later, for inference or as a training checkpoint, or by
    this project (see export.py)."""
    source = file.with_name(CFG)
    cfg, weights = _read_json(source), _rename_tensors(load_file(file))
    # SAELens 3 to 5 described TopK differently
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
    """Read settings that this project wrote; UserError if a newer version added some."""
    kind = ARCHITECTURES.get(settings["name"])
    known = {field.name for field in fields(kind.config)} if kind else settings.keys() - {"name"}
    if unknown := settings.keys() - known:
        key = min(unknown)
        raise UserError(
            f"{source}: {OWN_KEY}.{key}={settings[key]} was written by another version: update, or "
            f"remove the key {OWN_KEY} to read the SAE as SAELens does"
        )
    return settings


def _translate_settings(source: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Translate SAELens' settings into ours."""
    kind = cfg["architecture"]
    _check_readable(source, "architecture", kind, SAELENS_KINDS)
    _check_readable(source, "activation_fn", cfg["activation_fn"], ["relu"])
    settings = {"name": SAELENS_KINDS[kind], "skip": "skip" in kind}
    if "topk" in kind:
        # SAELens' default is 100; k of its BatchTopK may be fractional
        settings["k"] = max(1, round(cfg.get("k", 100)))
    if kind == "matryoshka_batchtopk":
        ends = [0, *cfg["matryoshka_widths"]]
        settings = _add_groups(settings, [end - start for start, end in pairwise(ends)])
    return settings


def _fold(weights: dict[str, Tensor], scale: float, rescale: bool) -> dict[str, Tensor]:
    """Convert SAELens' weights, which expect activations times `scale`, to weights for raw ones.

    With `rescale`, SAELens multiplies feature activations by the norms of decoder rows. BatchTopK's
    threshold then applies to the products, so it is divided by `scale` like them. Its initial value
    -1 is read as 0, which lets all of relu(z) pass.
    """
    if (weights.get("scaling_factor", torch.zeros(1)) == 1).all():
        del weights["scaling_factor"]  # in SAELens before 6; 1 has no effect
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
    """The factor by which SAELens multiplies activations; 1 if it is folded into the weights."""
    if normalisation == "none":
        return 1.0
    setting = f"{source}: normalize_activations={normalisation}"
    if normalisation not in (True, "expected_average_only_in"):
        raise UserError(
            f"{setting} cannot be folded into the weights; only expected_average_only_in can"
        )
    scaler = source.with_name("activation_scaler.json")  # in training checkpoints
    factor = _read_json(scaler).get("scaling_factor") if scaler.is_file() else None
    if factor is None:
        raise UserError(
            f"{setting}, but the factor is not saved: fold it in with SAELens "
            "(sae.fold_activation_norm_scaling_factor) and save again"
        )
    return factor


def read_sparsify(file: Path) -> StoredSAE:
    """Read an SAE or transcoder of sparsify; all are TopK."""
    cfg, tensors = _read_json(file.with_name(CFG)), load_file(file)
    activation = "signed topk" if cfg.get("signed") else cfg.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{file.with_name(CFG)}: activation {activation!r} is not supported (topk)")
    settings = {"name": "topk", "k": cfg["k"], "skip": "W_skip" in tensors}
    return StoredSAE(
        settings, _rename_tensors(tensors), cfg, centred=not cfg.get("transcode", False)
    )


def read_dictionary_learning(file: Path) -> StoredSAE:
    """Read a folder of dictionary_learning, whose activation scale is folded into the weights."""
    source = file.with_name("config.json")
    cfg = _read_json(source)
    trainer = _drop_nulls(cfg["trainer"])
    _check_readable(source, "dict_class", trainer["dict_class"], DICTIONARIES)
    name, centred = DICTIONARIES[trainer["dict_class"]]
    tensors = load_tensors(file)
    settings = {"name": name}
    if name in ("topk", "batch_topk", "matryoshka"):
        # k in the weights is final; training may have annealed it from the config's k
        settings["k"] = int(tensors.pop("k", trainer["k"]))
    if "group_sizes" in tensors:
        settings = _add_groups(settings, tensors.pop("group_sizes").int().tolist())
    weights = _rename_tensors(tensors)
    if name == "topk":
        weights.pop("threshold", None)  # unused: each token has exactly k features
    elif "threshold" in weights:
        weights["threshold"] = weights["threshold"].clamp(min=0).expand_as(weights["b_enc"])
    metadata = {
        "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "context_size": cfg.get("buffer", {}).get("ctx_len"),
    }
    return StoredSAE(settings, weights, metadata | trainer, centred)


FORMATS = {
    WEIGHTS: read_saelens,  # with cfg.json beside it
    "sae.safetensors": read_sparsify,  # with cfg.json beside it
    "ae.pt": read_dictionary_learning,  # with config.json beside it
}
