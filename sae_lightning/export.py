"""The on-disk format: a folder that SAELens opens and that takes raw LLM activations.

sae/cfg.json                  what it is, for SAELens and for us, and what it was trained on
sae/sae_weights.safetensors   W_enc [d_in, features], b_enc [features],
                              W_dec [features, d_out], b_dec [d_out] and, by kind,
                              threshold [features] (JumpReLU, BatchTopK, Matryoshka),
                              r_mag, b_mag [features] (gated, where b_enc is called b_gate),
                              W_skip [d_in, d_out] (skip transcoders)
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import atomically, write_json
from sae_lightning.sae import ARCHITECTURES, SAE, build

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
OURS = "sae_lightning"  # the key in cfg.json under which we describe the SAE ourselves
# SAELens' name of a kind -> the class that does the same, where cfg.json does not say more
READERS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
THEIRS = {"gated": {"b_enc": "b_gate"}}  # names of tensors: ours -> SAELens'
TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
SKIP_TRANSCODERS = {"standard": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}


def save_sae(folder: Path, sae: SAE, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write folded weights of `sae` (see `SAE.fold`) as a SAELens folder, atomically.

    `metadata` holds SAELens' own keys (model_name, hook_name, ...) and ours; with hook_name_out it
    is a transcoder. (SAELens has none with TopK or gates: it opens those as what they compute, but
    for the skip connection, which only `load_sae` reads.)
    """
    kind = sae.architecture
    if "hook_name_out" in metadata:
        kind = (SKIP_TRANSCODERS if sae.config.skip else TRANSCODERS).get(kind, kind)
    d_in, features = weights["W_enc"].shape
    cfg = {
        "architecture": kind,
        "d_in": d_in,
        "d_out": weights["W_dec"].shape[1],
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        # b_dec is not subtracted from the input: SAELens would do so by default
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        **sae.saelens(),
        OURS: asdict(sae.config),
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    names = THEIRS.get(sae.architecture, {})
    write_json(folder / CFG, cfg)
    with atomically(folder / WEIGHTS) as temporary:
        save_file({names.get(name, name): value for name, value in weights.items()}, temporary)


def load_sae(path: str | os.PathLike) -> SAE:
    """Read an SAE for raw LLM activations from a run folder, its `sae/`, or a SAELens folder.

    The result is on the CPU, frozen, in float32; `sae.metadata` tells what it was trained on.
    """
    folder = Path(path)
    folder = folder / "sae" if (folder / "sae" / CFG).is_file() else folder
    try:
        cfg = json.loads((folder / CFG).read_text(encoding="utf8"))
        weights = load_file(folder / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} holds no saved SAE: give a run folder (outputs/<day>/<time>) or a folder "
            f"with {CFG} and {WEIGHTS}"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged or not an SAE: {error}") from error
    if not isinstance(cfg, dict):
        raise UserError(f"{folder / CFG} is damaged or not an SAE: it holds no settings")
    name, settings = _description(folder, cfg)
    ours = {theirs: mine for mine, theirs in THEIRS.get(name, {}).items()}
    weights = {ours.get(key, key): weight.float() for key, weight in weights.items()}
    if cfg.get("apply_b_dec_to_input", True) and weights.keys() >= {"W_enc", "b_enc", "b_dec"}:
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    try:
        d_in, features = weights["W_enc"].shape
        config = ARCHITECTURES[name].config(**{"features": features} | settings | {"name": name})
        sae = build(config, d_in, weights["W_dec"].shape[1])
        sae.load_weights(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is damaged or not an SAE: it holds {', '.join(sorted(weights))}"
        ) from error
    sae.metadata = cfg.get("metadata", {})
    return sae.requires_grad_(False).eval()


def _description(folder: Path, cfg: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of the architecture that cfg.json describes."""
    if isinstance(cfg.get(OURS), dict) and cfg[OURS].get("name") in ARCHITECTURES:
        return cfg[OURS]["name"], cfg[OURS]
    if cfg.get("normalize_activations", "none") != "none":
        raise UserError(f"{folder / CFG}: fold normalize_activations into the weights first")
    kinds = READERS | {
        theirs: READERS[kind]
        for table in (TRANSCODERS, SKIP_TRANSCODERS)
        for kind, theirs in table.items()
    }
    kind = cfg.get("architecture")
    if kind not in kinds:
        raise UserError(
            f"{folder / CFG}: architecture {kind!r} is not one that this version reads "
            f"({', '.join(kinds)})"
        )
    settings: dict[str, Any] = {"skip": kind in SKIP_TRANSCODERS.values()}
    if kind == "topk":
        settings["k"] = cfg.get("k", 100)  # what SAELens takes for one that is not given
    return kinds[kind], settings
