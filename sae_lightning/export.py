"""The on-disk format: a folder that SAELens opens and that takes raw LLM activations.

sae/cfg.json                  what it is, and what it was trained on
sae/sae_weights.safetensors   W_enc [d_in, features], b_enc [features],
                              W_dec [features, d_out], b_dec [d_out]
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from sae_lightning.errors import UserError
from sae_lightning.files import atomically, write_json
from sae_lightning.sae import SAE, ReLU, SAEConfig

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
READERS: dict[str, type[SAE]] = {"standard": ReLU}
"""The class of each `architecture` that a cfg.json can name."""


def save_sae(folder: Path, architecture: str, weights: dict[str, Tensor], metadata: dict) -> None:
    """Write folded weights (see `SAE.fold`) as a SAELens folder, atomically.

    `metadata` holds SAELens' own keys (model_name, hook_name, ...) and ours.
    """
    d_in, features = weights["W_enc"].shape
    cfg = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        # b_dec is not subtracted from the input: SAELens would do so by default
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **metadata},
    }
    write_json(folder / CFG, cfg)
    with atomically(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)


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
    network = READERS.get(cfg.get("architecture"))
    if network is None:
        known = ", ".join(READERS)
        raise UserError(
            f"{folder / CFG}: architecture {cfg.get('architecture')!r} is not one that this "
            f"version reads ({known})"
        )
    if cfg.get("normalize_activations", "none") != "none":
        raise UserError(f"{folder / CFG}: fold normalize_activations into the weights first")
    if set(weights) != {"W_enc", "b_enc", "W_dec", "b_dec"}:
        raise UserError(
            f"{folder / WEIGHTS} is damaged or not an SAE: it holds {', '.join(sorted(weights))}"
        )
    weights = {name: weight.float() for name, weight in weights.items()}
    d_in, features = weights["W_enc"].shape
    if cfg.get("apply_b_dec_to_input", True):
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    sae = network(
        SAEConfig(features=features), d_in, weights["W_dec"].shape[1], Generator().manual_seed(0)
    )
    sae.load_state_dict(weights)
    sae.metadata = cfg.get("metadata", {})
    return sae.requires_grad_(False).eval()
