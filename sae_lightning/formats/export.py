"""The on-disk format: a folder that SAELens opens and that takes raw LLM activations.

sae/cfg.json                  what it is, for SAELens and for us, and what it was trained on
sae/sae_weights.safetensors   W_enc [d_in, features], b_enc [features],
                              W_dec [features, d_out], b_dec [d_out] and, by kind,
                              threshold [features] (JumpReLU, BatchTopK, Matryoshka),
                              r_mag, b_mag [features] (gated, where b_enc is called b_gate),
                              W_skip [d_out, d_in] (skip transcoders)
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import atomically, write_json
from sae_lightning.formats.readers import CFG, OURS, WEIGHTS, Stored, read
from sae_lightning.sae import ARCHITECTURES, SAE, build

# kind, with a skip connection -> SAELens' name of the transcoder
TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}


def save_sae(folder: Path, sae: SAE, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write folded weights of `sae` (see `SAE.fold`) as a SAELens folder, atomically.

    `metadata` holds SAELens' own keys (model_name, hook_name, ...) and ours; with hook_name_out it
    is a transcoder. SAELens knows no transcoder with TopK or gates: it opens those as the plain
    kind if both sites are equally wide, and not at all with a skip connection; `load_sae` reads
    all of them.
    """
    kind = sae.architecture
    if "hook_name_out" in metadata:
        kind = TRANSCODERS.get((kind, sae.config.skip), kind)
    cfg = {
        "architecture": kind,
        "d_in": weights["W_enc"].shape[0],
        "d_out": weights["W_dec"].shape[1],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        # b_dec is not subtracted from the input: SAELens would do so by default
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        **sae.saelens(),
        OURS: asdict(sae.config),
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    tensors = dict(weights)
    if kind == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    write_json(folder / CFG, cfg)
    with atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)


@torch.no_grad()
def load_sae(path: str | os.PathLike) -> SAE:
    """Read an SAE for raw LLM activations from a run folder, its `sae/`, or a folder that SAELens,
    sparsify or dictionary_learning wrote.

    The result is on the CPU, frozen, in float32; `sae.metadata` tells what it was trained on.
    """
    stored = read(Path(path))
    sae = _build(stored)
    if stored.centred:
        _centre(stored, sae)
    sae.metadata = stored.metadata
    return sae.requires_grad_(False).eval()


def _centre(stored: Stored, sae: SAE) -> None:
    """Have the encoder read x where it was made for x - b_dec."""
    d_in, d_out = len(sae.W_enc), len(sae.b_dec)
    if d_in != d_out:
        _refuse(stored, f"an input of width {d_in} cannot lose a b_dec of width {d_out}")
    one, mean = torch.ones(()), sae.b_dec.double()
    # a skip connection is not centred: what `fold` takes from it is given back
    back = mean @ sae.W_skip.double() if sae.config.skip else torch.zeros(d_out)
    sae.load_weights(sae.fold(mean, one, back, one))


def _build(stored: Stored) -> SAE:
    """The SAE with the stored weights, which have to be all of its own and no others."""
    given = {name: tuple(weight.shape) for name, weight in stored.weights.items()}
    for name in ("W_enc", "W_dec"):
        if len(given.get(name, ())) != 2:
            _refuse(stored, f"it holds {', '.join(sorted(given)) or 'nothing'}")
    settings = {"features": given["W_enc"][1]} | stored.settings
    try:
        config = ARCHITECTURES[settings["name"]].config(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{stored.file.parent} is damaged or not an SAE: {error}") from error
    sae = build(config, given["W_enc"][0], given["W_dec"][1])
    own = {name: tuple(weight.shape) for name, weight in sae.weights().items()}
    for name in sorted(own.keys() | given.keys()):
        if name not in given:
            _refuse(stored, f"{name} is missing")
        if name not in own:
            _refuse(stored, f"{name} is no part of a {config.name} SAE")
        if given[name] != own[name]:
            _refuse(stored, f"{name} is {list(given[name])} and should be {list(own[name])}")
    sae.load_weights(stored.weights)
    return sae


def _refuse(stored: Stored, why: str) -> None:
    raise UserError(f"{stored.file} is damaged or not an SAE: {why}")
