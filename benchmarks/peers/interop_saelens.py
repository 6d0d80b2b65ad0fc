"""SAELens for `interop.py`: its `SAE.load_from_disk`, and what it saves for inference."""

from collections.abc import Iterator
from pathlib import Path

import sae_lens
import torch
from peers.exchange import Run, shake
from sae_lens.saes import transcoder

PACKAGE = "sae-lens"
SHAPE = {"d_in": 16, "d_sae": 40, "dtype": "float32", "device": "cpu"}
# name -> beginning of the class's name, and settings
UNTRAINED = {
    "relu": ("Standard", {}),
    "relu uncentred": ("Standard", {"apply_b_dec_to_input": False}),
    "topk": ("TopK", {"k": 7}),
    "topk rescaled": ("TopK", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLU", {}),
    "gated": ("Gated", {}),
}
TRAINED = {
    "trained topk": ("TopK", {"k": 7}),
    "trained jumprelu": ("JumpReLU", {}),
    "trained batch_topk": ("BatchTopK", {"k": 7.5}),
    "trained matryoshka": ("MatryoshkaBatchTopK", {"k": 7, "matryoshka_widths": [4, 16, 40]}),
}
TRANSCODERS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


def load(folder: Path) -> Run:
    """Open with `SAE.load_from_disk`."""
    return _run(sae_lens.SAE.load_from_disk(folder))


def _run(sae) -> Run:
    return lambda x: (sae(x), sae.encode(x))


def make(root: Path) -> Iterator[tuple[str, Run]]:
    """SAEs for inference, training SAEs saved for inference, and transcoders."""
    for name, (kind, settings) in UNTRAINED.items():
        config = getattr(sae_lens, f"{kind}SAEConfig")(**SHAPE, **settings)
        sae = shake(getattr(sae_lens, f"{kind}SAE")(config))
        sae.save_model(root / name)
        yield name, _run(sae)
    for name, (kind, settings) in TRAINED.items():
        config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
            **SHAPE, decoder_init_norm=1.0, **settings
        )
        sae = shake(getattr(sae_lens, f"{kind}TrainingSAE")(config))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold += torch.tensor(0.7)
        sae.save_inference_model(root / name)
        yield name, load(root / name)
    for kind in TRANSCODERS:
        config = getattr(transcoder, f"{kind}Config")(**SHAPE, d_out=7, apply_b_dec_to_input=False)
        sae = shake(getattr(transcoder, kind)(config))
        sae.save_model(root / kind)
        yield kind, _run(sae)
