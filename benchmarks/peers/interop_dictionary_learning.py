"""dictionary_learning for `interop.py`: its `load_dictionary`, and all classes that this opens.

The folders are those of its `trainSAE`: `ae.pt` with the weights, and `config.json` with the
trainer's settings. Features of ReLU SAEs that the tool wrote are compared as they were trained; the
tool's loader would multiply them by the norms of the decoder rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from dictionary_learning.trainers import (
    batch_top_k,
    gdm,
    jumprelu,
    matryoshka_batch_top_k,
    p_anneal,
    standard,
    top_k,
)
from dictionary_learning.utils import load_dictionary
from peers.exchange import Run, make_run, shake

PACKAGE = "dictionary-learning"
SETTINGS = {"steps": 10_000, "activation_dim": 16, "dict_size": 40, "layer": 3, "lm_name": "gpt2"}
SETTINGS |= {"device": "cpu", "seed": 0, "submodule_name": "resid_post_layer_3"}
TRAINERS = {
    "relu": (standard.StandardTrainer, {}),
    "relu (April update)": (standard.StandardTrainerAprilUpdate, {}),
    "p-anneal": (p_anneal.PAnnealTrainer, {}),
    "gated": (gdm.GatedSAETrainer, {}),
    "topk": (top_k.TopKTrainer, {"k": 7}),
    "batch_topk": (batch_top_k.BatchTopKTrainer, {"k": 7}),
    "jumprelu": (jumprelu.JumpReluTrainer, {}),
    "matryoshka": (
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        {"k": 7, "group_fractions": [0.1, 0.3, 0.6]},
    ),
}


def load(folder: Path) -> Run:
    """Open with `load_dictionary`."""
    dictionary, _ = load_dictionary(str(folder), device="cpu")
    return make_run(dictionary)


def make(root: Path) -> Iterator[tuple[str, Run]]:
    """An SAE of each trainer, saved as at the end of `trainSAE`."""
    for name, (kind, settings) in TRAINERS.items():
        trainer = kind(**SETTINGS, **settings)
        sae = shake(trainer.ae)
        if sae.state_dict().get("threshold", torch.zeros(0)).ndim == 0:
            sae.threshold.fill_(0.7)
        folder = root / name
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {}}))
        yield name, make_run(sae)
