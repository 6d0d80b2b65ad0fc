"""JumpReLU: one threshold a feature, applied once, whose gradients are worked out by hand."""

import math

import pytest
import torch
from superposed import l0, make_head, preact_revives, revived, train
from torch import tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.sae import TrainingStatus, build_sae
from sae_lightning.sae.jumprelu import JumpReLUConfig, JumpReLULoss, PenaltyKind
from sae_lightning.sae.matrix import DenseMatrix


def hand_made(bandwidth=1.0):
    """Two inputs, two features with thresholds 1 and 2, one output."""
    sae = build_sae(JumpReLUConfig(name="jumprelu", features=2, bandwidth=bandwidth), 2, 1)
    sae.load_weights(
        {
            "W_enc": torch.eye(2),
            "b_enc": tensor([0.0, 0.5]),
            "W_dec": tensor([[1.0], [10.0]]),
            "b_dec": tensor([0.25]),
            "threshold": tensor([1.0, 2.0]),
        }
    )
    return sae


# pre-activations (1.2, 1.5), (0.8, 2.4), (3, 2.1), (-1, 0.5); thresholds (1, 2)
X = tensor([[1.2, 1.0], [0.8, 1.9], [3.0, 1.6], [-1.0, 0.0]])


@torch.no_grad()
def test_what_exceeds_its_threshold_fires_with_its_whole_strength_by_hand():
    # dictionary_learning issue 55: nothing is subtracted, and no second threshold cuts off more
    sae = hand_made()
    assert_close(sae.threshold, tensor([1.0, 2.0]))
    features = tensor([[1.2, 0.0], [0.0, 2.4], [3.0, 2.1], [0.0, 0.0]])
    assert_close(sae.encode(X), features)
    assert_close(sae(X).reconstruction, tensor([[1.45], [24.25], [24.25], [0.25]]))
    this = sae.training_pass(X)
    assert torch.equal(this.features.values, sae.encode(X))
    assert torch.equal(this.reconstruction, sae(X).reconstruction)


@torch.no_grad()
def test_a_strength_between_0_and_the_threshold_does_not_fire_and_above_it_all_do():
    sae = hand_made()
    sae.log_threshold.fill_(math.log(0.5))
    z = torch.linspace(-1, 1, 201)[:, None]
    fired = sae.encode(torch.cat([z, z - 0.5], dim=1))
    assert torch.equal(fired, torch.where(z > 0.5, z, 0.0).expand(-1, 2))


def test_the_gradient_of_the_jump_by_hand():
    # width 1: the window of feature 0 is 0.5 ... 1.5, that of feature 1 is 1.5 ... 2.5 (open)
    # in it: 1.2 and 0.8 of feature 0; 2.4 and 2.1 of feature 1 (1.5 is at its edge)
    sae = hand_made()
    weight = tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    x = X.clone().requires_grad_()
    pre = sae.pre_activations(x)
    pre.retain_grad()
    (sae.activate(pre) * weight).sum().backward()
    # input: the gradient itself where the feature is on, else 0
    assert_close(pre.grad, tensor([[1.0, 0.0], [0.0, 4.0], [5.0, 6.0], [0.0, 0.0]]))
    # threshold: -threshold / width x the gradients in the window: -1 x (1 + 3), -2 x (4 + 6);
    # its logarithm's is that times the threshold
    assert_close(sae.log_threshold.grad, tensor([-4.0 * 1, -20.0 * 2]))


def test_the_gradient_of_the_step_by_hand():
    sae = hand_made()
    this = sae.training_pass(X)
    count = sae.count_active(this.pre)
    assert count == (1 + 1 + 2 + 0) / 4
    count.backward()
    # -1 / width x tokens in the window / batch: -2/4 each; times the threshold
    assert_close(sae.log_threshold.grad, tensor([-0.5 * 1, -0.5 * 2]))
    assert sae.W_enc.grad is None, "the number of active features has no other gradient"


def test_a_wider_window_sees_more_and_weighs_it_less():
    # width 4: -1 ... 3 and 0 ... 4 (open): two and four of the pre-activations
    sae = hand_made(bandwidth=4.0)
    sae.count_active(DenseMatrix(sae.pre_activations(X))).backward()
    assert_close(sae.log_threshold.grad, tensor([-2 / 4 / 4 * 1, -4 / 4 / 4 * 2]))


def test_the_gradient_of_the_step_is_that_of_the_smoothed_count():
    """A window that slides over uniform pre-activations: d/d threshold of the share above it."""
    sae = hand_made(bandwidth=0.5)
    z = torch.linspace(0, 4, 40_001)[:, None].expand(-1, 2)
    sae.count_active(DenseMatrix(z)).backward()
    # both count: d/d threshold (4 - threshold) / 4 = -1/4, times the threshold
    assert_close(sae.log_threshold.grad, tensor([-0.25, -0.5]), rtol=1e-3, atol=0)


def test_penalties_by_hand():
    sae = hand_made()
    this, status = sae.training_pass(X), TrainingStatus(torch.zeros(2).bool(), 0.5)
    step = JumpReLULoss(penalty_kind=PenaltyKind.step).terms(sae, this, X[:, :1], status)
    assert (set(step), step["l0"].item()) == ({"mse", "l0"}, 1.0)
    tanh = JumpReLULoss(penalty_kind=PenaltyKind.tanh, tanh_scale=0.1)
    # decoder norms 1 and 10
    strengths = [0.1 * 1.2, 0.1 * 24, 0.1 * 3, 0.1 * 21]
    expected = sum(math.tanh(s) for s in strengths) / 4
    assert tanh.terms(sae, this, X[:, :1], status)["l0"].item() == pytest.approx(expected)
    assert tanh.coefficients() == {"l0": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PenaltyKind)
def test_l0_falls_when_its_coefficient_rises_over_three_decades(kind):
    # a known failure elsewhere (SAELens issues 382, 494, 719): the coefficient has no effect
    reached, errors = [], []
    for coefficient in (1e-4, 1e-3, 1e-2, 1e-1):
        head = make_head("jumprelu", loss={"l0": coefficient, "penalty_kind": kind})
        train(head, 200)
        reached.append(l0(head))
        errors.append(head.last_step.terms["mse"].item())
    assert all(b < 0.8 * a for a, b in zip(reached, reached[1:], strict=False)), reached
    assert reached[0] > 5 * reached[-1]
    assert errors == sorted(errors), "fewer features explain less"


@pytest.mark.slow
def test_the_coefficient_is_adjusted_until_l0_is_at_its_target():
    head = make_head("jumprelu", loss={"target_l0": 5})
    train(head, 300)
    assert l0(head) == pytest.approx(5, rel=0.1)


def test_the_pre_activation_loss_is_the_distance_to_the_threshold_by_hand():
    sae = hand_made()
    loss = JumpReLULoss(preact=0.5)
    assert loss.coefficients() == {"l0": 1e-3, "preact": 0.5}
    dead = tensor([False, True])
    term = loss.terms(sae, sae.training_pass(X), X[:, :1], TrainingStatus(dead, 0.5))["preact"]
    # feature 1, threshold 2, norm 10: 0.5, 0, 0 and 1.5 are missing
    assert term.item() == pytest.approx((0.5 + 1.5) / 4 * 10)
    term.backward()
    assert_close(sae.b_enc.grad, tensor([0.0, -2 / 4 * 10]))
    assert sae.log_threshold.grad is None, "pre-activations rise, the threshold does not fall"


@pytest.mark.slow
def test_the_pre_activation_loss_brings_dead_features_back():
    assert preact_revives("jumprelu", {"l0": 1e-2}) >= 10


def test_resampling_brings_dead_features_back_with_the_threshold_of_the_start():
    head = make_head("jumprelu", loss={"l0": 1e-2})
    assert revived(head) >= 18
    assert_close(head.sae.threshold[24:].detach(), torch.full((24,), 0.1))


def test_thresholds_are_saved_as_they_are():
    sae, again = hand_made(), hand_made()
    saved = sae.weights()
    assert set(saved) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert_close(saved["threshold"], tensor([1.0, 2.0]))
    again.load_weights(saved)
    assert_close(again.threshold, sae.threshold, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_threshold_of_0_is_a_relu():
    sae = hand_made()
    sae.load_weights(sae.weights() | {"threshold": torch.zeros(2)})
    assert_close(sae.encode(X), sae.pre_activations(X).relu())


@pytest.mark.parametrize("name", ["threshold", "bandwidth"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_value_without_meaning_names_its_setting(name, value):
    with pytest.raises(UserError, match=rf"^model\.{name}={value}: give a positive number"):
        JumpReLUConfig(**{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_without_meaning_is_refused(value):
    with pytest.raises(UserError, match=rf"^loss\.tanh_scale={value}: give a positive number"):
        JumpReLULoss(tanh_scale=value)


def test_a_scale_is_that_of_tanh_alone_where_it_is_4_unless_given():
    with pytest.raises(UserError, match=r"^loss\.tanh_scale=2\.0 has no effect with "):
        JumpReLULoss(tanh_scale=2.0, penalty_kind=PenaltyKind.step)
    sae, status = hand_made(), TrainingStatus(torch.zeros(2).bool(), 0.5)
    this = sae.training_pass(X)
    given, default = (JumpReLULoss(tanh_scale=scale) for scale in (4.0, None))
    assert given.penalty(sae, this, status) == default.penalty(sae, this, status)
