"""Published suites of SAEs for `interop.py`, as SAELens' own loaders open their files.

Instead of downloading the suites, `make` writes tiny files under their names and in their layouts,
as SAELens' loaders describe them, and has the loaders open these files.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sae_lens
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError
from peers.exchange import Run
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file, save_file
from torch import Tensor

PACKAGE = "sae-lens"
D, FEATURES, NORM = 16, 40, 9.0
GEMMA, GEMMA_2 = "google/gemma-scope-2b-pt", "google/gemma-scope-2-1b-pt"
CASES = {  # path on the hub -> the loader in SAELens
    f"{GEMMA}-res/layer_3/width_16k/average_l0_50": "gemma_2",
    f"{GEMMA}-mlp/layer_3/width_16k/average_l0_50": "gemma_2",
    f"{GEMMA}-att/layer_3/width_16k/average_l0_50": "gemma_2",
    f"{GEMMA}-res/embedding/width_4k/average_l0_6": "gemma_2",
    f"{GEMMA}-transcoders/layer_3/width_16k/average_l0_50": "gemma_2_transcoder",
    f"{GEMMA_2}/resid_post/layer_3_width_16k_l0_medium": "gemma_3",
    f"{GEMMA_2}/attn_out/layer_3_width_16k_l0_medium": "gemma_3",
    f"{GEMMA_2}/transcoder/layer_3_width_16k_l0_medium": "gemma_3",
    f"{GEMMA_2}/transcoder_all/layer_3_width_16k_l0_small_affine": "gemma_3",
    "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x": "llama_scope",
    "fnlp/Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L3R": "llama_scope_r1_distill",
    "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_7/layer3.sae.pt": "qwen_scope",
    "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth": "goodfire",
    "mwhanna/qwen3-4b-transcoders/layer_3.safetensors": "mwhanna_transcoder",
}


def make(root: Path) -> Iterator[tuple[str, Run]]:
    """Write the files of each suite, and open them with its loader in SAELens."""

    def find(repo_id: str, filename: str, subfolder: str = "", **_) -> str:
        file = root / repo_id / subfolder / filename
        if not file.is_file():
            raise EntryNotFoundError(str(file))
        return str(file)

    def read_shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(x.shape) for name, x in load_file(find(repo_id, filename)).items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = find, read_shapes
    for path, suite in CASES.items():
        owner, name, inside = path.split("/", 2)
        write(suite, root / path)
        # replaces the sizes that a loader takes from the name
        size = {"d_in": D, "d_sae": FEATURES} | ({"d_out": D} if "transcoder" in path else {})
        cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[suite](
            f"{owner}/{name}", inside, cfg_overrides=size | {"dtype": "float32"}
        )
        cfg = loaders.handle_config_defaulting(cfg)
        kind = sae_lens.SAE.get_sae_class_for_architecture(cfg["architecture"])
        settings = sae_lens.SAE.get_sae_config_class_for_architecture(cfg["architecture"])
        sae = kind(settings.from_dict(cfg))
        sae.process_state_dict_for_loading(state)
        sae.load_state_dict(state)
        if sae.cfg.normalize_activations != "none":
            sae.fold_activation_norm_scaling_factor(math.sqrt(D) / NORM)
        yield path, _run(sae)


def _run(sae) -> Run:
    heads = sae.cfg.reshape_activations == "hook_z"  # it takes [n, heads, d_head]

    def run(x):
        x = x[:, None] if heads else x
        return sae(x).flatten(1), sae.encode(x)

    return run


def write(suite: str, path: Path) -> None:
    """Write the files of one SAE at `path`, a folder or a file."""
    weights = {
        "W_enc": torch.randn(D, FEATURES),
        "W_dec": torch.randn(FEATURES, D),
        "b_enc": torch.randn(FEATURES),
        "b_dec": torch.randn(D),
        "threshold": torch.rand(FEATURES) + 1,
    }
    folder = path.parent if path.suffix in (".pt", ".pth", ".safetensors") else path
    folder.mkdir(parents=True, exist_ok=True)
    match suite:
        case "gemma_2" | "gemma_2_transcoder":
            np.savez(path / "params.npz", **{name: x.numpy() for name, x in weights.items()})
        case "gemma_3":
            tensors = {name.replace("W_", "w_"): x for name, x in weights.items()}
            cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
            if "transcoder" in path.parent.name:
                cfg["affine_connection"] = path.name.endswith("_affine")
            if cfg.get("affine_connection"):
                tensors["affine_skip_connection"] = torch.randn(D, D)
            save_file(tensors, path / "params.safetensors")
            _write_json(path / "config.json", cfg)
        case "llama_scope":
            (path / "checkpoints").mkdir()
            save_file(_transpose(weights, "."), path / "checkpoints" / "final.safetensors")
            cfg = {"d_model": D, "d_sae": FEATURES, "jump_relu_threshold": 1.5}
            cfg["hook_point_in"] = cfg["hook_point_out"] = "blocks.3.hook_resid_post"
            cfg["dataset_average_activation_norm"] = {"in": NORM, "out": NORM}
            _write_json(path / "hyperparams.json", cfg)
        case "llama_scope_r1_distill":
            threshold = {"log_jumprelu_threshold": weights["threshold"].log()}
            save_file(_transpose(weights, ".") | threshold, path / "sae_weights.safetensors")
            cfg = {"sae_type": "sae", "d_model": D, "expansion_factor": 2.5, "act_fn": "jumprelu"}
            cfg |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False}
            cfg["hook_point_in"] = cfg["hook_point_out"] = "blocks.3.hook_resid_post"
            cfg["dataset_average_activation_norm"] = {"in": NORM, "out": NORM}
            _write_json(path / "config.json", cfg)
        case "qwen_scope":
            tensors = {"W_enc": weights["W_enc"].T, "W_dec": weights["W_dec"].T}
            torch.save(tensors | {name: weights[name] for name in ("b_enc", "b_dec")}, path)
        case "goodfire":
            torch.save(_transpose(weights, "_linear."), path)
        case "mwhanna_transcoder":
            tensors = {name: weights[name] for name in ("W_dec", "b_enc", "b_dec")}
            save_file(tensors | {"W_enc": weights["W_enc"].T.contiguous()}, path)
            cfg = {"model_name": "Qwen/Qwen3-4B", "model_kind": "transcoder_set"}
            cfg |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
            wandb = {"d_model": D, "d_feature": FEATURES, "batch_size": 64}
            wandb = {name: {"value": value} for name, value in wandb.items()}
            (folder / "wandb-config.yaml").write_text(yaml.safe_dump(wandb))


def _transpose(weights: dict[str, Tensor], join: str) -> dict[str, Tensor]:
    """Weights under the names of two linear layers, which store them transposed."""
    return {
        f"encoder{join}weight": weights["W_enc"].T.contiguous(),
        f"encoder{join}bias": weights["b_enc"],
        f"decoder{join}weight": weights["W_dec"].T.contiguous(),
        f"decoder{join}bias": weights["b_dec"],
    }


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))
