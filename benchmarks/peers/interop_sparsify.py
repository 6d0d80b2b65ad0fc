"""sparsify for `interop.py`: its `SparseCoder`, for SAEs and (skip) transcoders."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from peers.exchange import Run, shake

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it uses Triton without a GPU

from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

PACKAGE = "eai-sparsify"
CODERS = {
    "topk": {},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "groupmax": {"activation": "groupmax", "k": 8},
}


def load(folder: Path) -> Run:
    """Open with `SparseCoder.load_from_disk`."""
    return _run(SparseCoder.load_from_disk(folder))


def _run(coder: SparseCoder) -> Run:
    def run(x):
        output = coder(x)
        features = torch.zeros(len(x), coder.num_latents)
        return output.sae_out, features.scatter(1, output.latent_indices, output.latent_acts)

    return run


def make(root: Path) -> Iterator[tuple[str, Run]]:
    """Each of CODERS, with 40 features."""
    for name, settings in CODERS.items():
        config = SparseCoderConfig(**{"num_latents": 40, "k": 7} | settings)
        coder = shake(SparseCoder(16, config))
        coder.save_to_disk(root / name)
        yield name, _run(coder)
