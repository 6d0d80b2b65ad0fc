"""Writes SAEs in the formats of the table."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import write_atomically, write_json
from sae_lightning.formats.format import Layout, Origin
from sae_lightning.formats.saved_format import save_sae
from sae_lightning.formats.table import FORMATS
from sae_lightning.sae import SAE

WRITABLE = tuple(
    name for name, entry in FORMATS.items() if entry.make_settings or name == "saelens"
)


@torch.no_grad()
def write_sae(name: str, sae: SAE, origin: Origin, folder: Path) -> None:
    """Write an SAE for raw activations into `folder` in the format `name`; UserError if the format
    cannot express it."""
    if name == "saelens":  # the saved format, which expresses every SAE
        save_sae(folder, sae, sae.weights(), origin.metadata)
        return
    entry, key = FORMATS[name], choose_layout(name, sae, origin)
    settings, tensors = entry.make_settings(sae, key, origin)
    tensors = convert_weights(entry.layouts[key], sae) | tensors
    file = entry.files[0]
    if "*" in file:  # a file for each block
        file = file.replace("*", str(origin.require_sites().source.layer))
    with write_atomically(folder / file) as temporary:
        if file.endswith(".safetensors"):
            save_file(tensors, temporary)
        else:
            torch.save(tensors, temporary)
    if entry.settings_file.endswith(".json"):
        write_json(folder / entry.settings_file, settings)
    else:
        with write_atomically(folder / entry.settings_file) as temporary:
            temporary.write_text(yaml.safe_dump(settings), encoding="utf8")


def choose_layout(name: str, sae: SAE, origin: Origin) -> str:
    """Choose the key in `layouts` of the format `name` under which `sae` is written; UserError if
    the format has none."""
    entry, architecture = FORMATS[name], sae.config.name
    if origin.is_transcoder:
        keys, noun, others = entry.transcoders, "transcoder", "autoencoders"
    else:
        keys, noun, others = entry.autoencoders, "autoencoder", "transcoders"
    if not keys:
        raise UserError(
            f"format={name} has no place for this {noun}: it holds {others} only; choose another "
            "format"
        )
    if architecture not in keys:
        raise UserError(
            f"format={name} has no {architecture} {noun}: it holds {', '.join(keys)}; choose "
            "another format"
        )
    key = keys[architecture]
    our_names = entry.layouts[key].names.values()
    if sae.config.skip and not any(name.startswith("W_skip") for name in our_names):
        raise UserError(
            f"format={name} has no skip connections (model.skip): choose another format"
        )
    if len(sae.W_enc) != len(sae.b_dec):
        raise UserError(
            f"format={name} has one width for input and output, and this SAE reads "
            f"{len(sae.W_enc)} dimensions and writes {len(sae.b_dec)}: choose another format"
        )
    return key


def convert_weights(layout: Layout, sae: SAE) -> dict[str, Tensor]:
    """The weights of `sae` under the names and in the orientation of `layout`."""
    weights = sae.weights()
    if layout.subtracts_b_dec:
        weights = center_encoder(sae)
    if "threshold" in weights:
        smallest = torch.finfo(torch.float32).tiny  # the logarithm of 0 is not finite
        weights["log_threshold"] = weights["threshold"].clamp(min=smallest).log()
    tensors = {}
    for theirs, ours in layout.names.items():
        if ours.removesuffix(".T") in weights:
            tensor = weights[ours.removesuffix(".T")]
            tensors[theirs] = (tensor.T if ours.endswith(".T") else tensor).clone().contiguous()
    return tensors


def center_encoder(sae: SAE) -> dict[str, Tensor]:
    """Convert the weights of `sae` for an encoder that reads x - b_dec; a skip connection still
    reads x. `load_sae` does the inverse."""
    one, mean = torch.ones(()), sae.b_dec.double()
    out_mean = -mean @ sae.W_skip.double() if sae.config.skip else torch.zeros_like(mean)
    return sae.fold(in_mean=-mean, in_scale=one, out_mean=out_mean, out_scale=one)
