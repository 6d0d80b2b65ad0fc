"""Opens SAEs of every format as SAEs of this project, for raw LLM activations."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sae_lightning.errors import UserError
from sae_lightning.formats.fetch import fetch_saved
from sae_lightning.formats.format import (
    Format,
    SavedFiles,
    StoredSAE,
    check_tensors,
    fold_scales,
    read_settings_file,
    read_weights,
)
from sae_lightning.formats.table import FORMATS, find_saes
from sae_lightning.sae import ARCHITECTURES, SAE, SAEConfig, build_sae
from sae_lightning.stream.states import expect


@torch.no_grad()
def load_sae(path: str | os.PathLike) -> SAE:
    """Load an SAE for raw LLM activations from a run folder, its `sae/`, or a folder or weights
    file in any format of the table FORMATS (docs/formats.md); with `hub:owner/name`, from the
    Hugging Face hub.

    The SAE is on the CPU, frozen, in float32; `sae.metadata` says what it was trained on. UserError
    if there is no SAE, more than one, or a file that is damaged or not supported.
    """
    path = fetch_saved(path)
    entry, folder, file = _find_weights(path)
    try:
        stored = entry.read(_read_files(entry, folder, file))
        sae = _build(stored._replace(weights=fold_scales(stored)))
        check_tensors(sae.weights())  # folding in a scale may have overflowed
        expect(stored.metadata, dict, "metadata")
    except FileNotFoundError as error:
        file_name = Path(error.filename).name
        raise UserError(f"{folder} holds no saved SAE: {file_name} is missing") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or folder} cannot be read: {reason}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        reason = reason or "a file ends early"  # EOFError has no message
        raise UserError(f"{folder} is damaged or not an SAE: {reason}") from error
    sae.metadata = stored.metadata
    return sae.requires_grad_(False).eval()


def _find_weights(path: Path) -> tuple[Format, Path, Path]:
    """The format of the SAE at `path` (a weights file, a folder, or a run folder), its folder and
    its weights file. UserError if there is none, or more than one."""
    if not path.exists():
        raise UserError(f"{path}: no such folder or file (on the hub: hub:<owner>/<name>)")
    if path.is_file():
        # the SAE's folder may be the one above: Llama Scope's weights are in its `checkpoints`
        file = path.absolute()
        root, subfolders = file.parent.parent, [file.parent.name]
        path_in_root = file.relative_to(root).as_posix()
    else:  # the folder of a run, whose SAE is in `sae`, or of an SAE
        root, subfolders, path_in_root = path, ["sae", "checkpoints"], "."
    folders = [root, *(root / name for name in subfolders)]
    files = [file for folder in folders for file in folder.glob("*") if file.is_file()]
    names = [file.relative_to(root).as_posix() for file in files]
    saes = find_saes(path_in_root, names)  # all paths are relative to `root`
    if not saes:
        weights_names = dict.fromkeys(entry.files[0] for entry in FORMATS.values())
        raise UserError(
            f"{path} holds no saved SAE: give a run folder (outputs/<day>/<time>), or a folder or "
            f"file of another tool ({', '.join(weights_names)})"
        )
    entry, folder, weights, _ = saes[0]
    if len(saes) > 1:
        raise UserError(
            f"{path} holds {len(saes)} SAEs: give one of the files, such as {root / weights}"
        )
    return entry, root / folder, root / weights


def _read_files(entry: Format, folder: Path, file: Path) -> SavedFiles:
    """Read settings and weights; FileNotFoundError if required settings are missing."""
    settings_file, settings = file, {}  # for error messages, if the format has no settings file
    if entry.settings_file:
        settings_file = folder / entry.settings_file
        if entry.settings_file in entry.files or settings_file.exists():  # `files` are required
            settings = read_settings_file(settings_file)
    return SavedFiles(file, settings_file, settings, read_weights(file))


def _build(stored: StoredSAE) -> SAE:
    """Build an SAE from stored weights; ValueError unless they have the names and shapes of its
    architecture."""
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
    if not stored.subtracts_b_dec:
        return sae
    # the encoder was trained on x - b_dec
    if d_in != d_out:
        raise ValueError(
            f"b_dec has width {d_out} and cannot be subtracted from inputs of width {d_in}"
        )
    one, mean = torch.ones(()), sae.b_dec.double()
    # `fold` also subtracts in_mean from the skip connection's input; out_mean undoes that
    out_mean = mean @ sae.W_skip.double() if config.skip else torch.zeros(d_out)
    sae.load_weights(sae.fold(in_mean=mean, in_scale=one, out_mean=out_mean, out_scale=one))
    return sae


def _make_config(settings: dict[str, Any], features: int) -> SAEConfig:
    """Make the config of an SAE with `features` features; ValueError if a setting is invalid."""
    expect(settings["features"], features, "features")  # before memory is allocated
    try:
        config = ARCHITECTURES[settings["name"]].config(**settings)
    except UserError as error:  # the caller adds the folder's name
        raise ValueError(str(error)) from error
    given = [field for field in fields(config) if field.name in settings]
    for field in given:
        value, is_list = getattr(config, field.name), field.type == list[float]
        items, item_type = (value, float) if is_list else ([value], field.type)
        for item in items:
            if type(item) is int and item_type is not int:
                item = float(item)  # JSON may write 1.0 as 1
            expect(item, item_type, field.name)
    return config
