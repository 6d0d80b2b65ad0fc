"""Writes the saved format: a folder that SAELens opens, with weights for raw LLM activations.

sae/cfg.json                  settings in SAELens' keys and in ours, and metadata of training
sae/sae_weights.safetensors   W_enc [d_in, features], b_enc [features],
                              W_dec [features, d_out], b_dec [d_out] and, by architecture,
                              threshold [features] (JumpReLU, BatchTopK, Matryoshka),
                              r_mag, b_mag [features] (gated, where b_enc is called b_gate),
                              W_skip [d_out, d_in] (skip transcoders)
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sae_lightning.files import write_atomically, write_json
from sae_lightning.formats.saelens import CFG, NOTE_KEY, OWN_KEY, TRANSCODERS, WEIGHTS
from sae_lightning.sae import SAE


def save_sae(folder: Path, sae: SAE, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write folded weights of `sae` (see `SAE.fold`) as a SAELens folder, each file atomically.

    `metadata` holds SAELens' keys (model_name, hook_name, ...) and ours; hook_name_out marks a
    transcoder.
    """
    architecture = sae.architecture  # SAELens' name of it
    if "hook_name_out" in metadata:
        if note := describe_limits(sae):
            metadata = metadata | {NOTE_KEY: note}
        architecture = TRANSCODERS.get((architecture, sae.config.skip), architecture)
    cfg = {
        "architecture": architecture,
        "d_in": weights["W_enc"].shape[0],
        "d_out": weights["W_dec"].shape[1],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        # by default SAELens would subtract b_dec from the input
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        **sae.saelens_settings(),
        # the start of training and the control are in the metadata: they change no output
        OWN_KEY: {k: v for k, v in asdict(sae.config).items() if k not in ("start", "control")},
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    tensors = dict(weights)
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    write_json(folder / CFG, cfg)
    with write_atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)


def describe_limits(sae: SAE) -> str | None:
    """How SAELens misreads a transcoder for which it has no class; None if it has one."""
    if (sae.architecture, sae.config.skip) in TRANSCODERS:
        return None
    limits = f"SAELens has no {sae.architecture} transcoder and opens this one as an autoencoder"
    if sae.config.skip:
        limits = f"SAELens has no {sae.architecture} transcoder with a skip connection"
    return f"{limits}; sae_lightning.load_sae reads it correctly"
