"""llamascopium for `interop.py`: its `SparseAutoEncoder`, for SAEs and transcoders.

`dataset-wise` SAEs read activations that its trainer has scaled to a mean norm of sqrt(d); the
reconstructions are scaled back. Some TopK SAEs rank features by strength times the norm of the
decoder row. These products are the strengths of our SAE, and are compared.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from peers.exchange import Run, shake

PACKAGE = "llamascopium"
HOOK, OTHER = "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"
COMMON = {"d_model": 16, "expansion_factor": 2.5, "hook_point_in": HOOK, "hook_point_out": HOOK}
COMMON |= {"norm_activation": "inference", "top_k": 7, "dtype": torch.float32}
KINDS = {
    "relu": {},
    "topk": {"act_fn": "topk"},
    "topk (plain norms)": {"act_fn": "topk", "sparsity_include_decoder_norm": False},
    "jumprelu": {"act_fn": "jumprelu"},
    "jumprelu (plain norms)": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
    "jumprelu (dataset-wise)": {"act_fn": "jumprelu", "norm_activation": "dataset-wise"},
    "topk (dataset-wise)": {"act_fn": "topk", "norm_activation": "dataset-wise"},
    "without decoder bias": {"use_decoder_bias": False},
    "transcoder": {"act_fn": "topk", "hook_point_out": OTHER},
    "transcoder (dataset-wise)": {"hook_point_out": OTHER, "norm_activation": "dataset-wise"},
    "batchtopk": {"act_fn": "batchtopk"},
    "token-wise": {"norm_activation": "token-wise"},
    "GLU encoder": {"use_glu_encoder": True},
}


def load(folder: Path) -> Run:
    """Open with `SparseAutoEncoder.from_pretrained`."""
    return _run(SparseAutoEncoder.from_pretrained(str(folder)))


def _run(sae: SparseAutoEncoder) -> Run:
    source, target = sae.cfg.hook_point_in, sae.cfg.hook_point_out

    def run(x):
        batch = {source: x, target: x}
        scaled, factors = sae.normalize_activations(batch, return_scale_factor=True)
        features = sae.encode(scaled[source])
        output = sae.denormalize_activations({target: sae.decode(features)}, factors)
        if sae.cfg.act_fn == "topk" and sae.cfg.sparsity_include_decoder_norm:
            features = features * sae.decoder_norm() / factors[target]
        return output[target], features

    return run


def make(root: Path) -> Iterator[tuple[str, Run]]:
    """An SAE of each of KINDS, saved as at the end of its training."""
    for name, settings in KINDS.items():
        sae = SparseAutoEncoder.from_config(SAEConfig(**COMMON | settings))
        sae.init_parameters(
            encoder_uniform_bound=0.3,
            decoder_uniform_bound=0.3,
            init_log_jumprelu_threshold_value=0,
        )
        shake(sae)
        if sae.cfg.norm_activation == "dataset-wise":
            norms = {HOOK: 9.0, OTHER: 14.0}
            hooks = sae.cfg.associated_hook_points
            sae.set_dataset_average_activation_norm({hook: norms[hook] for hook in hooks})
        (root / name).mkdir(parents=True)
        sae.cfg.save_hyperparameters(root / name)
        sae.save_pretrained(root / name)
        yield name, _run(sae)
