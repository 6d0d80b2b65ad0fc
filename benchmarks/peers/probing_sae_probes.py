"""The package sae-probes for `probing.py`, in its own environment; it imports nothing of ours."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import sae_lens
from sae_probes.run_baselines import run_baseline_dataset_layer
from sae_probes.run_sae_evals import get_save_metrics_path, run_sae_eval
from sae_probes.utils_data import DATA_PATH, get_train_test_indices, get_yvals

SEED, MAX_TEXTS = 42, 5000  # the package's


def list_texts(sets: list[str]) -> dict[str, Any]:
    """The package's version, its folder of sets, and the labels and the split of each set into
    training and test texts."""
    splits = {}
    for name in sets:
        y = get_yvals(name)[:MAX_TEXTS]
        train = min(len(y) - 100, 1024)
        parts = get_train_test_indices(y, train, len(y) - train - 1, 0.5, SEED)
        splits[name] = {"labels": y.tolist(), "split": [part.tolist() for part in parts]}
    version = importlib.metadata.version("sae-probes")
    return {"version": version, "folder": str(DATA_PATH / "cleaned_data"), "splits": splits}


def score(sets: list[str], sae: str, activations: str, out: str, sizes: list[int]) -> dict:
    """Set -> the units that the package chooses, AUROC by k, and AUROC of its dense probe.
    `activations`: the folder in which the package finds the LLM's activations."""
    names = {"model_name": "llm", "hook_name": "site", "model_cache_path": activations}
    opened, scores = sae_lens.SAE.load_from_disk(sae), {}
    for name in sets:
        settings = {"reg_type": "l2", "setting": "normal", "dataset": name}
        run_sae_eval(opened, **settings, **names, device="cpu", ks=sizes, results_path=out)
        site = {n: names[n] for n in ("model_name", "hook_name")}
        file = get_save_metrics_path(**settings, **site, sae_results_path=out)
        results = json.loads(file.read_text())
        run_baseline_dataset_layer("site", name, "logreg", "llm", activations, out)
        (dense,) = Path(out).glob(f"baseline_results_llm/normal_setting/{name}_site*.json")
        scores[name] = {
            "units": results[-1]["indices"],
            "auroc": {str(row["k"]): row["test_auc"] for row in results},
            "dense": json.loads(dense.read_text())[0]["test_auc"],
        }
    return scores
