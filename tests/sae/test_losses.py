"""Training objectives against sums done by hand."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.losses import l1, mse
from sae_lightning.sae import ARCHITECTURES, Output, SAEConfig, build
from sae_lightning.sae.relu import DenseLoss, ReLULoss


def test_mse_is_the_mean_over_tokens_and_elements():
    # errors (1, 2), (0, -5): (1 + 4 + 0 + 25) / 4
    reconstruction = tensor([[1.0, 2.0], [3.0, 0.0]])
    target = tensor([[0.0, 0.0], [3.0, 5.0]])
    assert mse(reconstruction, target) == 7.5
    assert mse(target, target) == 0


def test_mse_of_half_precision_is_computed_in_float32():
    # (300 - 0)^2 = 90 000 is beyond float16, whose largest number is 65 504
    reconstruction = tensor([[300.0]], dtype=torch.float16)
    assert mse(reconstruction, tensor([[0.0]])) == 90_000


def test_l1_weighs_each_feature_by_the_norm_of_its_decoder_row():
    # rows of length 5, 1 and 2
    W_dec = tensor([[3.0, 4.0], [0.0, -1.0], [2.0, 0.0]])
    # token 1: 1 x 5 + 2 x 1 = 7; token 2: 0.5 x 2 = 1; mean 4
    features = tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.5]])
    assert_close(l1(features, W_dec), tensor(4.0))


def test_shrinking_features_and_growing_the_decoder_gains_nothing():
    features, W_dec = torch.rand(20, 6), torch.randn(6, 4)
    c = torch.rand(6) + 0.1
    assert_close((features * c) @ (W_dec / c[:, None]), features @ W_dec)  # the same output
    assert_close(l1(features * c, W_dec / c[:, None]), l1(features, W_dec))  # at the same price
    assert l1(features * 0.5, W_dec) < l1(features, W_dec)


def test_the_gradient_of_l1_reaches_features_and_decoder():
    # d/df = |W_dec_i| / batch;  d/dW_dec_i = mean f_i x W_dec_i / |W_dec_i|
    features = tensor([[1.0], [3.0]], requires_grad=True)
    W_dec = tensor([[3.0, 4.0]], requires_grad=True)
    l1(features, W_dec).backward()
    assert_close(features.grad, tensor([[2.5], [2.5]]))
    assert_close(W_dec.grad, tensor([[1.2, 1.6]]))  # 2 x (0.6, 0.8)


def one_pass():
    """An SAE with one feature of decoder norm 5, and what it makes of two tokens."""
    sae = build(SAEConfig(features=1), 2, 2)
    sae.load_state_dict(
        {
            "W_enc": tensor([[1.0], [0.0]]),
            "b_enc": tensor([0.0]),
            "W_dec": tensor([[3.0, 4.0]]),
            "b_dec": tensor([0.0, 0.0]),
        }
    )
    # f = 1 and 0; x_hat = (3, 4) and (0, 0); errors (2, 4), (1, 0)
    x = tensor([[1.0, 0.0], [-1.0, 0.0]])
    return sae, sae(x), x


def test_the_relu_objective_is_the_error_and_the_penalty():
    terms = ReLULoss(l1=0.1).terms(*one_pass())
    assert {name: term.item() for name, term in terms.items()} == {
        "mse": (4 + 16 + 1 + 0) / 4,
        "l1": (1 * 5 + 0) / 2,
    }
    assert ReLULoss(l1=0.1).coefficients() == {"l1": 0.1}
    assert ReLULoss(warmup=0.3).penalty_warmup == 0.3


def test_the_dense_objective_is_the_error_alone():
    terms = DenseLoss().terms(*one_pass())
    assert {name: term.item() for name, term in terms.items()} == {"mse": 5.25}
    assert DenseLoss().coefficients() == {}
    assert DenseLoss().penalty_warmup == 0


def test_the_target_may_be_another_site_than_the_input():
    sae, _, _ = one_pass()
    output = Output(reconstruction=tensor([[1.0, 1.0]]), features=tensor([[0.0]]))
    assert ReLULoss().terms(sae, output, tensor([[0.0, 3.0]]))["mse"] == 2.5


def test_every_coefficient_belongs_to_a_term():
    for loss in (ReLULoss(), DenseLoss()):
        assert set(loss.coefficients()) <= set(loss.terms(*one_pass()))


def test_every_architecture_has_an_objective():
    assert set(LOSSES) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "settings",
    [{"l1": -1e-3}, {"l1": math.inf}, {"l1": math.nan}, {"warmup": -0.1}, {"warmup": 1.1}],
)
def test_a_coefficient_without_meaning_names_its_setting(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError) as error:
        ReLULoss(**settings)
    assert str(error.value).startswith(f"loss.{name}={value}: give a ")


def test_the_ends_of_the_ranges_are_allowed():
    assert ReLULoss(l1=0, warmup=0).coefficients() == {"l1": 0}
    assert ReLULoss(warmup=1).penalty_warmup == 1


def test_the_penalty_is_computed_in_fp32_under_autocast():
    features = torch.rand(64, 33, generator=torch.Generator().manual_seed(0))
    W_dec = torch.randn(33, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = l1(features, W_dec)
    assert mixed.dtype is torch.float32
    assert mixed.item() == l1(features, W_dec).item()
