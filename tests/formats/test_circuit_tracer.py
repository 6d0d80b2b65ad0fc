"""circuit-tracer's transcoders, checked against its equations."""

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.testing import assert_close

from sae_lightning import UserError, load_sae

D, FEATURES, K = 8, 24, 4
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def weights() -> dict[str, torch.Tensor]:
    """W_enc and W_dec are both [features, d]."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (FEATURES, D), "W_dec": (FEATURES, D), "b_enc": (FEATURES,), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write(folder, settings: dict, **more: torch.Tensor):
    """A set with one transcoder."""
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model_kind": "transcoder_set", "model_name": "gpt2", **HOOKS, **settings})
    )
    save_file(weights() | more, folder / "layer_2.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "stored"),
    [({"activation": "topk", "k": K}, {}), ({}, {"k": torch.tensor(K)})],
)
def test_k_makes_it_a_topk_wherever_it_is(tmp_path, settings, stored):
    """`config.yaml` says k; what circuit-tracer saves itself has it among the weights, too."""
    sae = load_sae(write(tmp_path, settings, **stored))
    x, w = torch.randn(50, D, generator=torch.Generator().manual_seed(1)), weights()
    pre = (x @ w["W_enc"].T + w["b_enc"]).relu()
    features = pre * (pre >= pre.topk(K).values[:, -1:])
    assert_close(sae(x).features, features)
    assert_close(sae(x).reconstruction, features @ w["W_dec"] + w["b_dec"])
    assert sae.metadata["hook_name_out"] == "blocks.2.hook_mlp_out"


def test_a_topk_without_k_is_refused(tmp_path):
    with pytest.raises(UserError, match="it lacks 'k'"):
        load_sae(write(tmp_path, {"activation": "topk"}))
