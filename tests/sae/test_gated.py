"""Gated: which path gets gradients from which term, and both paths by hand."""

import math

import pytest
import torch
from superposed import l0, make_head, preact_revives, revived, train
from torch import tensor
from torch.testing import assert_close

from sae_lightning.sae import TrainingStatus, build_sae
from sae_lightning.sae.gated import GatedConfig, GatedLoss
from sae_lightning.sae.losses import l1

NOTHING_DEAD = torch.zeros(2).bool()


def hand_made(**settings):
    """Two inputs, two features, one output; magnitudes 2 x and 1 x + 1."""
    sae = build_sae(GatedConfig(name="gated", features=2, **settings), 2, 1)
    weights = {
        "W_enc": torch.eye(2),
        "b_enc": tensor([-1.0, 0.5]),
        "W_dec": tensor([[3.0], [-10.0]]),
        "b_dec": tensor([0.25]),
        "r_mag": tensor([math.log(2), 0.0]),
        "b_mag": tensor([0.0, 1.0]),
    }
    sae.load_weights(sae.weights() | weights)
    return sae


# gate = x + (-1, 0.5); strength = relu(2 x_0), relu(x_1 + 1)
# (2, 1):       gate (1, 1.5),    strength (4, 2)
# (0.5, -0.2):  gate (-0.5, 0.3), strength (1, 0.8): the first is closed
# (3, -2):      gate (2, -1.5),   strength (6, 0)
X = tensor([[2.0, 1.0], [0.5, -0.2], [3.0, -2.0]])
GATE = tensor([[1.0, 1.5], [-0.5, 0.3], [2.0, -1.5]])
FEATURES = tensor([[4.0, 2.0], [0.0, 0.8], [6.0, 0.0]])


@torch.no_grad()
def test_gate_and_strength_by_hand():
    sae = hand_made()
    assert_close(sae.encode(X), FEATURES)
    # 12 - 20 + 0.25, -8 + 0.25, 18 + 0.25
    assert_close(sae(X).reconstruction, tensor([[-7.75], [-7.75], [18.25]]))
    this = sae.training_pass(X)
    assert_close(this.pre.values, GATE)
    assert torch.equal(this.features.values, sae.encode(X))
    assert torch.equal(this.reconstruction, sae(X).reconstruction)


@torch.no_grad()
def test_an_open_gate_lets_a_strength_through_that_may_be_0():
    sae = hand_made()
    sae.b_mag.fill_(-100)
    assert not sae.encode(X).any()


def terms_of(sae, loss=None):
    this = sae.training_pass(X)
    target = tensor([[1.0], [2.0], [3.0]])
    return (loss or GatedLoss()).terms(sae, this, target, TrainingStatus(NOTHING_DEAD, 0.5))


def test_the_terms_by_hand():
    terms = terms_of(hand_made())
    assert set(terms) == {"mse", "l1", "gate"}
    # errors -8.75, -9.75, 15.25
    assert terms["mse"].item() == pytest.approx((8.75**2 + 9.75**2 + 15.25**2) / 3)
    # relu(gate) (1, 1.5), (0, 0.3), (2, 0), norms 3 and 10
    assert terms["l1"].item() == pytest.approx((3 + 15 + 3 + 6) / 3)
    # decoded: 3 - 15 + 0.25, -3 + 0.25, 6 + 0.25 against 1, 2, 3
    assert terms["gate"].item() == pytest.approx((12.75**2 + 4.75**2 + 3.25**2) / 3)
    assert GatedLoss(l1=0.2).coefficients() == {"l1": 0.2, "gate": 1.0}


def gradients(sae, term):
    names, parameters = zip(*sae.named_parameters(), strict=True)
    given = torch.autograd.grad(term, parameters, allow_unused=True)
    return {
        name: gradient
        for name, gradient in zip(names, given, strict=True)
        if gradient is not None and gradient.abs().max() > 1e-5
    }


def test_the_error_does_not_reach_the_gate():
    sae = hand_made()
    got = gradients(sae, terms_of(sae)["mse"])
    assert set(got) == {"W_enc", "W_dec", "b_dec", "r_mag", "b_mag"}  # not b_enc, the gate's bias
    # d/d strength = 2/3 error W_dec, where open and positive: errors -8.75, -9.75, 15.25
    to = tensor([[2 / 3 * -8.75 * 3, 2 / 3 * 8.75 * 10], [0, 2 / 3 * 97.5], [2 / 3 * 45.75, 0]])
    assert_close(got["b_mag"], to.sum(dim=0))
    # the strengths are 2 x_0 and x_1 + 1: r_mag's gradient is x exp(r_mag) = 2 x_0, x_1
    assert_close(got["r_mag"], (to * X * tensor([2.0, 1.0])).sum(dim=0))
    # ... and W_enc's x exp(r_mag): only the path of the strength
    assert_close(got["W_enc"], X.T @ (to * tensor([2.0, 1.0])))


def test_the_gates_term_does_not_reach_the_decoder_nor_the_strengths():
    sae = hand_made()
    got = gradients(sae, terms_of(sae)["gate"])
    assert set(got) == {"W_enc", "b_enc"}
    # errors -12.75, -4.75, 3.25; open: both, the second, the first
    to = tensor([[-12.75 * 3, 127.5], [0, 47.5], [3.25 * 3, 0]]) * 2 / 3
    assert_close(got["b_enc"], to.sum(dim=0))
    assert_close(got["W_enc"], X.T @ to)


def test_the_penalty_reaches_the_gate_alone():
    sae = hand_made()
    got = gradients(sae, terms_of(sae)["l1"])
    assert set(got) == {"W_enc", "b_enc"}
    assert_close(got["b_enc"], tensor([3.0 * 2 / 3, 10.0 * 2 / 3]))  # open twice each of 3


def test_the_gates_term_reconstructs_beside_a_skip_connection():
    """What x W_skip explains is not the gate's to explain again."""
    sae = hand_made(skip=True)
    with torch.no_grad():
        sae.W_skip.copy_(tensor([[1.0], [2.0]]))
    term = terms_of(sae)["gate"]
    # as above, and x W_skip = 4, 0.1, -1 more
    assert term.item() == pytest.approx((8.75**2 + 4.65**2 + 2.25**2) / 3)
    assert set(gradients(sae, term)) == {"W_enc", "b_enc"}


def test_the_pre_activation_loss_is_about_the_gate():
    sae, loss = hand_made(), GatedLoss(preact=1.0)
    status = TrainingStatus(tensor([True, True]), 0.5)
    terms = loss.terms(sae, sae.training_pass(X), X[:, :1], status)
    # below 0: 0.5 of the first with norm 3, 1.5 of the second with norm 10
    assert terms["preact"].item() == pytest.approx((0.5 * 3 + 1.5 * 10) / 3)
    assert set(gradients(sae, terms["preact"])) == {"W_enc", "b_enc"}


@pytest.mark.slow
def test_l0_falls_when_l1_rises():
    reached = []
    for coefficient in (1e-3, 1e-2, 1e-1, 1.0):
        head = make_head("gated", loss={"l1": coefficient})
        train(head, 120)
        reached.append(l0(head))
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < 0.2 * reached[0]


@pytest.mark.slow
def test_strengths_are_not_shrunk_by_the_penalty():
    """At the same L0 a gated SAE explains more than a ReLU one, whose strengths shrink."""
    errors = {}
    for name in ("relu", "gated"):
        head = make_head(name, loss={"l1": 0.1, "target_l0": 5})
        train(head, 250)
        errors[name] = head.last_step.terms["mse"].item()
    assert errors["gated"] < 0.7 * errors["relu"]


def test_the_coefficient_is_adjusted_until_l0_is_at_its_target():
    head = make_head("gated", loss={"l1": 2e-2, "target_l0": 5})
    train(head, 400)
    assert l0(head) == pytest.approx(5, rel=0.1)


@pytest.mark.slow
def test_the_pre_activation_loss_brings_dead_features_back():
    assert preact_revives("gated", {"l1": 3e-2}) >= 18


def test_resampling_brings_dead_features_back_with_both_paths_equal():
    head = make_head("gated", loss={"l1": 3e-2})
    train(head, 5)
    assert head.sae.r_mag[24:].all()
    assert revived(head) >= 18
    assert not head.sae.r_mag[24:].any()
    assert not head.sae.b_mag[24:].any()


def test_both_paths_start_equal_and_the_biases_of_both_keep_pace():
    head = make_head("gated")
    pre = head.sae.pre_activations(X.repeat(1, 8))
    assert_close(head.sae.activate(pre), pre.relu())
    assert set(head.sae.biases) == {"b_enc", "b_mag"}
    assert_close(head.sae.W_dec.norm(dim=1).detach(), torch.ones(48))
    assert_close(l1(pre.relu(), head.sae.W_dec.norm(dim=1)), pre.relu().sum(dim=1).mean())
