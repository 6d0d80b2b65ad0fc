"""circuit-tracer for `interop.py`: its `load_transcoders` opens a set with a transcoder for every
block of an LLM. The first transcoder is compared.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.utils.hf_utils import load_transcoders
from peers.exchange import Run, shake
from torch.nn.functional import relu

PACKAGE = "circuit-tracer"
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
KINDS = {  # name -> function that makes the activation function, whether there is a skip connection
    "relu": (lambda: relu, False),
    "relu skip": (lambda: relu, True),
    "jumprelu": (lambda: JumpReLU(torch.full((40,), 0.5)), False),
    "jumprelu skip": (lambda: JumpReLU(torch.full((40,), 0.5)), True),
    "topk": (lambda: TopK(7), False),
}


def load(folder: Path) -> Run:
    """Open as `load_transcoder_from_hub` does, which downloads the same files."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = sorted(folder.glob("layer_*.safetensors"), key=lambda file: int(file.stem[6:]))
    config = {"scan": None} | config | {"transcoders": [str(file) for file in files]}
    transcoders = load_transcoders(config, torch.device("cpu"), torch.float32, lazy_decoder=False)
    return _run(transcoders[0])


def _run(transcoder: SingleLayerTranscoder) -> Run:
    def run(x):
        features = transcoder.encode(x)
        return transcoder.decode(features, x), features

    return run


def make(root: Path) -> Iterator[tuple[str, Run]]:
    """A set of each of KINDS, for an LLM with one block."""
    for name, (activation, skip) in KINDS.items():
        cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
        transcoders = {0: shake(SingleLayerTranscoder(16, 40, activation(), 0, skip, **cpu))}
        if "jumprelu" in name:
            transcoders[0].activation_function.threshold.abs_()
        whole = TranscoderSet(transcoders, **HOOKS)
        whole.to_safetensors(str(root / name))
        config = {"model_name": "gpt2", "model_kind": "transcoder_set", **HOOKS}
        config |= {"activation": "topk", "k": 7} if name == "topk" else {}
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
        yield name, _run(whole[0])
