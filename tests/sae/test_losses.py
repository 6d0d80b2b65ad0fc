"""Training objectives against sums done by hand."""

import math

import pytest
import torch
from torch import Generator, tensor
from torch.testing import assert_close

from sae_lightning.sae import ARCHITECTURES, TrainingStatus, build_sae
from sae_lightning.sae.base import TrainingOutput
from sae_lightning.sae.losses import auxk, l1, lp, mse, preact, tanh_l0
from sae_lightning.sae.matrix import DenseMatrix
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.topk import TopKConfig


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
    assert_close(l1(features, W_dec.norm(dim=1)), tensor(4.0))


def test_shrinking_features_and_growing_the_decoder_gains_nothing():
    features, W_dec = torch.rand(20, 6), torch.randn(6, 4)
    c = torch.rand(6) + 0.1
    other, norms = W_dec / c[:, None], W_dec.norm(dim=1)
    assert_close((features * c) @ other, features @ W_dec)  # the same output
    assert_close(l1(features * c, other.norm(dim=1)), l1(features, norms))  # at the same price
    assert l1(features * 0.5, norms) < l1(features, norms)


def test_the_gradient_of_l1_reaches_features_and_decoder():
    # d/df = |W_dec_i| / batch;  d/dW_dec_i = mean f_i x W_dec_i / |W_dec_i|
    features = tensor([[1.0], [3.0]], requires_grad=True)
    W_dec = tensor([[3.0, 4.0]], requires_grad=True)
    l1(features, W_dec.norm(dim=1)).backward()
    assert_close(features.grad, tensor([[2.5], [2.5]]))
    assert_close(W_dec.grad, tensor([[1.2, 1.6]]))  # 2 x (0.6, 0.8)


NORMS = tensor([5.0, 1.0, 2.0])


@pytest.mark.parametrize("p", [1.0, 0.7, 0.2])
def test_lp_has_the_value_of_l1_at_any_p(p):
    features = torch.rand(30, 3, generator=Generator().manual_seed(0)) * 4
    assert_close(lp(features, NORMS, p), l1(features, NORMS))


def test_lp_presses_weak_features_harder_and_l1_all_alike():
    # strengths 0.1 and 3; l1 = 3.1. Without smoothing the gradient at p = 0.5 is
    # 0.5 s^-0.5 x 3.1 / (0.1^0.5 + 3^0.5) = 2.392, 0.437
    features, norms = tensor([[0.1, 3.0]], requires_grad=True), torch.ones(2)
    (plain,) = torch.autograd.grad(l1(features, norms), features)
    assert_close(plain, tensor([[1.0, 1.0]]))
    (annealed,) = torch.autograd.grad(lp(features, norms, 0.5, smooth=0.0), features)
    total = 0.1**0.5 + 3**0.5
    assert_close(annealed, tensor([[0.5 / s**0.5 * 3.1 / total for s in (0.1, 3)]]))
    assert annealed[0, 0] > 2 > 0.5 > annealed[0, 1]
    # p = 1 is l1
    (same,) = torch.autograd.grad(lp(features, norms, 1.0), features)
    assert_close(same, plain)


def test_the_slope_of_lp_at_0_is_bounded():
    features = tensor([[0.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(lp(features, torch.ones(2), 0.2, smooth=0.01), features)
    # 0.2 x 0.01^-0.8 x (1 / (1.01^0.2 - 0.01^0.2)) = 7.96 x 1.653
    assert_close(gradient[0, 0], tensor(0.2 * 0.01**-0.8 / (1.01**0.2 - 0.01**0.2)))


def test_where_nothing_fires_lp_is_0_and_so_is_its_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    value = lp(features, NORMS, 0.5)
    value.backward()
    assert value == 0
    assert not features.grad.any()


def test_tanh_l0_by_hand():
    # strengths (0.5, 0, 1) x norms (5, 1, 2) = 2.5, 0, 2; scale 0.4: tanh(1) + tanh(0.8)
    features = tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0]])
    expected = (math.tanh(1.0) + math.tanh(0.8)) / 2
    assert_close(tanh_l0(features, NORMS, 0.4), tensor(expected))
    # with a large scale it is the number of active features
    assert_close(tanh_l0(features, NORMS, 1000), tensor(1.0))


# pre-activations of 4 features on 2 tokens; features 1 and 3 are dead
PRE = tensor([[9.0, 2.0, 9.0, -1.0], [9.0, 1.0, 9.0, 3.0]])
DEAD = tensor([False, True, False, True])
ROWS = tensor([[7.0, 7.0], [1.0, 0.0], [7.0, 7.0], [0.0, 2.0]])
# relu of the dead: (2, 0) and (1, 3); decoded: (2, 0) and (1, 6)
DECODED = tensor([[2.0, 0.0], [1.0, 6.0]])


def test_auxk_is_0_where_the_dead_features_are_the_residual():
    assert auxk(DECODED, PRE[:, DEAD], ROWS[DEAD], k=2) == 0


def test_auxk_by_hand():
    # residual 0 against decoded (2, 0), (1, 6), shifted by (1, -1) and (-1, 1):
    # errors (1, 1), (2, 5) -> (1 + 1 + 4 + 25) / 4; variance of the residual: 1
    residual = tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert auxk(residual, PRE[:, DEAD], ROWS[DEAD], k=2).item() == (1 + 1 + 4 + 25) / 4
    # the strongest alone: 2 and 3: (2, 0), (0, 6): errors (1, 1), (1, 5)
    assert auxk(residual, PRE[:, DEAD], ROWS[DEAD], k=1).item() == (1 + 1 + 1 + 25) / 4


def test_auxk_is_a_share_of_the_residuals_variance():
    """What says nothing leaves all of it, whatever the residual's size; the mean is no part."""
    noise = torch.randn(500, 2, generator=Generator().manual_seed(0))
    pre = torch.zeros(500, 4)
    for size in (1e-3, 1.0, 1e3):
        residual = size * (noise - noise.mean(dim=0))
        assert_close(auxk(residual, pre, ROWS, k=4), tensor(1.0))
    # a feature that gives the mean, (3, 0), of a residual around it
    pre[:, 1] = 3
    residual = noise - noise.mean(dim=0) + tensor([3.0, 0.0])
    assert_close(auxk(residual, pre, ROWS, k=4), tensor(1.0))


def test_auxk_does_not_count_b_dec_twice():
    """sparsify issue 132: the residual is target - x_hat, and x_hat holds b_dec already."""
    sae = build_sae(TopKConfig(name="topk", features=4, k=1), 2, 2)
    with torch.no_grad():
        sae.W_dec.copy_(ROWS)
        sae.b_dec.copy_(tensor([100.0, -100.0]))
    features, pre = DenseMatrix(torch.zeros(2, 4)), DenseMatrix(PRE)
    this = TrainingOutput(torch.zeros(2, 2), torch.zeros(2, 2) + sae.b_dec, features, pre)
    target = DECODED + sae.b_dec.detach()  # b_dec and what the dead say
    terms = AuxKLoss(auxk_k=2).terms(sae, this, target, TrainingStatus(DEAD, 0.5))
    assert terms["auxk"] == 0


def test_auxk_teaches_the_dead_alone():
    pre, rows = PRE.clone().requires_grad_(), ROWS.clone().requires_grad_()
    residual = tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    auxk(residual, pre[:, DEAD], rows[DEAD], k=2).backward()
    assert residual.grad is None
    for gradient in (pre.grad.T, rows.grad):
        assert gradient.any(dim=1).tolist() == DEAD.tolist()
    # 2 x error / 4 elements x row: errors (1, 1), (2, 5); off (-1) gets none
    assert_close(pre.grad[:, [1, 3]], tensor([[0.5 * 1, 0.0], [0.5 * 2, 0.5 * 5 * 2]]))
    assert_close(rows.grad[1], 0.5 * (2 * tensor([1.0, 1.0]) + 1 * tensor([2.0, 5.0])))


@pytest.mark.parametrize(
    ("residual", "dead"),
    [
        (DECODED, torch.zeros(4).bool()),  # nothing is dead
        (torch.ones(2, 2), DEAD),  # nothing varies
        (torch.zeros(2, 2), DEAD),  # nothing is left
    ],
)
def test_auxk_without_anything_to_do_is_0_and_its_gradient_is_no_nan(residual, dead):
    pre = PRE.clone().requires_grad_()
    value = auxk(residual, pre[:, dead], ROWS[dead], k=2) + 0 * pre.sum()
    value.backward()
    assert value == 0
    assert not pre.grad.any()


def test_preact_by_hand():
    # threshold 0: feature 1 never below, feature 3 by 1 on the first token: norm 2
    pre = PRE.clone().requires_grad_()
    value = preact(pre[:, DEAD], 0.0, ROWS[DEAD].norm(dim=1))
    assert value.item() == 1 * 2 / 2
    value.backward()
    assert_close(pre.grad, tensor([[0.0, 0, 0, -1], [0, 0, 0, 0]]))
    # thresholds 1.5 and 4: 0.5 of norm 1 on the second token; 5 and 1 of norm 2
    value = preact(PRE[:, DEAD], tensor([1.5, 4.0]), ROWS[DEAD].norm(dim=1))
    assert value.item() == (0.5 * 1 + 5 * 2 + 1 * 2) / 2


@pytest.mark.parametrize("threshold", [0.0, torch.ones(0)])
def test_preact_of_no_dead_feature_is_0(threshold):
    assert preact(-PRE[:, :0], threshold, torch.ones(0)) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_coefficient_belongs_to_a_term(name):
    config, _, objective = ARCHITECTURES[name]
    loss = objective()
    sae = build_sae(config(name=name, features=64), 8, 8)
    x = torch.randn(20, 8, generator=Generator().manual_seed(0))
    terms = loss.terms(sae, sae.training_pass(x), x, TrainingStatus(torch.zeros(64).bool(), 0.5))
    assert set(terms) == {"mse", *loss.coefficients()}
    assert all(term.isfinite() and term.shape == () for term in terms.values())
    assert loss.sparsity in {None, *loss.coefficients()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_target_may_be_another_site_than_the_input(name):
    config, _, objective = ARCHITECTURES[name]
    sae = build_sae(config(name=name, features=64), 8, 5)
    x = torch.randn(20, 8, generator=Generator().manual_seed(0))
    this, target = sae.training_pass(x), torch.full((20, 5), 2.0)
    terms = objective().terms(sae, this, target, TrainingStatus(torch.zeros(64).bool(), 0.5))
    assert_close(terms["mse"], (this.reconstruction - 2).square().mean())


@pytest.mark.parametrize(
    "penalty",
    [
        l1,
        lambda features, norms: lp(features, norms, 0.5),
        lambda features, norms: tanh_l0(features, norms, 4.0),
        lambda features, norms: preact(-features, 0.1, norms),
    ],
    ids=["l1", "lp", "tanh_l0", "preact"],
)
def test_the_penalty_is_computed_in_fp32_under_autocast(penalty):
    features = torch.rand(64, 33, generator=torch.Generator().manual_seed(0))
    norms = torch.rand(33, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = penalty(features, norms)
    assert mixed.dtype is torch.float32
    assert mixed.item() == penalty(features, norms).item()
