"""The saved format: a folder that SAELens opens, with weights for raw LLM activations.

sae/cfg.json                  settings in SAELens' keys and in ours, and metadata of training
sae/sae_weights.safetensors   W_enc [d_in, features], b_enc [features],
                              W_dec [features, d_out], b_dec [d_out] and, by architecture,
                              threshold [features] (JumpReLU, BatchTopK, Matryoshka),
                              r_mag, b_mag [features] (gated, where b_enc is called b_gate),
                              W_skip [d_out, d_in] (skip transcoders)
"""

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import write_atomically, write_json
from sae_lightning.formats.readers import (
    CFG,
    FORMATS,
    NOTE_KEY,
    OWN_KEY,
    TRANSCODERS,
    WEIGHTS,
    StoredSAE,
    check_numbers,
)
from sae_lightning.sae import ARCHITECTURES, SAE, SAEConfig, build_sae
from sae_lightning.stream.states import expect


def save_sae(folder: Path, sae: SAE, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write folded weights of `sae` (see `SAE.fold`) as a SAELens folder, each file atomically.

    `metadata` holds SAELens' keys (model_name, hook_name, ...) and ours; hook_name_out marks a
    transcoder.
    """
    kind = sae.architecture
    if "hook_name_out" in metadata:
        metadata = metadata | ({NOTE_KEY: note} if (note := describe_limits(sae)) else {})
        kind = TRANSCODERS.get((kind, sae.config.skip), kind)
    cfg = {
        "architecture": kind,
        "d_in": weights["W_enc"].shape[0],
        "d_out": weights["W_dec"].shape[1],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        # by default SAELens would subtract b_dec from the input
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        **sae.saelens_settings(),
        OWN_KEY: asdict(sae.config),
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    tensors = dict(weights)
    if kind == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    write_json(folder / CFG, cfg)
    with write_atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)


def describe_limits(sae: SAE) -> str | None:
    """How SAELens misreads a transcoder that it has no class for; None if it has one."""
    if (sae.architecture, sae.config.skip) in TRANSCODERS:
        return None
    limits = f"SAELens has no {sae.architecture} transcoder and opens this one as an autoencoder"
    if sae.config.skip:
        limits = f"SAELens has no {sae.architecture} transcoder with a skip connection"
    return f"{limits}; sae_lightning.load_sae reads it correctly"


@torch.no_grad()
def load_sae(path: str | os.PathLike) -> SAE:
    """Load an SAE for raw LLM activations from a run folder, its `sae/`, or a folder written by
    SAELens, sparsify or dictionary_learning.

    The SAE is on the CPU, frozen, in float32; `sae.metadata` says what it was trained on.
    """
    files = [folder / name for folder in (Path(path, "sae"), Path(path)) for name in FORMATS]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise UserError(
            f"{path} holds no saved SAE: give a run folder (outputs/<day>/<time>) or a folder with "
            f"one of {', '.join(FORMATS)}"
        )
    try:
        stored = FORMATS[file.name](file)
        sae = _build(stored)
        check_numbers(sae.weights())  # folding in a scale may have overflowed
        expect(stored.metadata, dict, "metadata")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UserError(f"{file.parent} holds no saved SAE: {missing} is missing") from error
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{error.filename or file.parent} cannot be read: {why}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        why = why or "a file ends early"
        raise UserError(f"{file.parent} is damaged or not an SAE: {why}") from error
    sae.metadata = stored.metadata
    return sae.requires_grad_(False).eval()


def _build(stored: StoredSAE) -> SAE:
    """Build an SAE from stored weights; ValueError unless all names and shapes match."""
    shapes = {name: list(weight.shape) for name, weight in stored.weights.items()}
    if any(len(shapes.get(name, ())) != 2 for name in ("W_enc", "W_dec")):
        raise ValueError(f"it holds {', '.join(sorted(shapes)) or 'nothing'}")
    (d_in, features), d_out = shapes["W_enc"], shapes["W_dec"][1]
    config = _make_config({"features": features} | stored.settings, features)
    sae = build_sae(config, d_in, d_out)
    expected = {name: list(weight.shape) for name, weight in sae.weights().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} does not belong to a {config.name} SAE")
        if shapes[name] != expected[name]:
            raise ValueError(f"{name} is {shapes[name]} and should be {expected[name]}")
    sae.load_weights(stored.weights)
    if not stored.centred:
        return sae
    # fold b_dec into the encoder, which was trained on x - b_dec
    if d_in != d_out:
        raise ValueError(
            f"b_dec has width {d_out} and cannot be subtracted from inputs of width {d_in}"
        )
    one, mean = torch.ones(()), sae.b_dec.double()
    # the skip connection reads x, not x - b_dec: add back what `fold` subtracts for it
    back = mean @ sae.W_skip.double() if config.skip else torch.zeros(d_out)
    sae.load_weights(sae.fold(mean, one, back, one))
    return sae


def _make_config(settings: dict[str, Any], features: int) -> SAEConfig:
    """Make the config of an SAE with `features` features; ValueError if a setting is invalid."""
    expect(settings["features"], features, "features")  # before memory for that many is allocated
    try:
        config = ARCHITECTURES[settings["name"]].config(**settings)
    except UserError as error:  # the caller adds the folder's name
        raise ValueError(str(error)) from error
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        is_list = kind == list[float]
        for item in value if is_list else [value]:
            number = float(item) if type(item) is int and kind is not int else item
            expect(number, float if is_list else kind, field.name)  # JSON may write 1.0 as 1
    return config
