"""Opens SAEs of every format as SAEs of this project, for raw LLM activations."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sae_lightning.errors import UserError
from sae_lightning.formats.fetch import fetch_saved
from sae_lightning.formats.readers import FORMATS, StoredSAE, check_numbers
from sae_lightning.sae import ARCHITECTURES, SAE, SAEConfig, build_sae
from sae_lightning.stream.states import expect


@torch.no_grad()
def load_sae(path: str | os.PathLike) -> SAE:
    """Load an SAE for raw LLM activations from a run folder, its `sae/`, or a folder written by
    SAELens, sparsify or dictionary_learning; with `hub:owner/name`, from the Hugging Face hub.

    The SAE is on the CPU, frozen, in float32; `sae.metadata` says what it was trained on.
    """
    path = fetch_saved(path)
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
