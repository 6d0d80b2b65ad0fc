"""ReLU: the equation by hand, its L1 penalty, p-annealing, and a target L0."""

import pytest
import torch
from superposed import DENSE_START, SITE, activations, l0, make_head, preact_revives, revived, train
from torch import tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.sae import SAEConfig, TrainingStatus, build_sae
from sae_lightning.sae.losses import l1, lp
from sae_lightning.sae.relu import DenseConfig, DenseLoss, ReLULoss

NOTHING_DEAD = torch.zeros(3).bool()


def hand_made():
    """d_in = 2, three features, d_out = 1."""
    sae = build_sae(SAEConfig(features=3), 2, 1)
    sae.load_weights(
        {
            "W_enc": tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]),
            "b_enc": tensor([0.5, -1.0, 0.0]),
            "W_dec": tensor([[1.0], [10.0], [100.0]]),
            "b_dec": tensor([0.25]),
        }
    )
    return sae


# x = (1, 2):    x W_enc + b_enc = ( 1 + .5, 4 - 1, -1 + 2) = ( 1.5,  3,  1)
# x = (-1, -2):                    (-1 + .5, -4 - 1, 1 - 2) = (-0.5, -5, -1) -> 0
X = tensor([[1.0, 2.0], [-1.0, -2.0]])


@torch.no_grad()
def test_relu_by_hand():
    sae = hand_made()
    assert_close(sae.encode(X), tensor([[1.5, 3.0, 1.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(sae(X).features, sae.encode(X))
    # 1.5 x 1 + 3 x 10 + 1 x 100 + 0.25;  nothing fires: b_dec
    assert_close(sae(X).reconstruction, tensor([[131.75], [0.25]]))


@torch.no_grad()
def test_training_and_inference_are_the_same():
    sae = hand_made()
    output = sae.training_pass(X)
    assert torch.equal(output.features.values, sae.encode(X))
    assert torch.equal(output.reconstruction, sae(X).reconstruction)
    assert_close(output.pre.values, tensor([[1.5, 3.0, 1.0], [-0.5, -5.0, -1.0]]))
    assert output.prefixes == ()


def terms_of(loss, progress=0.5):
    # features (1.5, 3, 1) and none; decoder norms 1, 10, 100; errors 1 and -2
    sae = hand_made()
    output = sae.training_pass(X)
    target = output.reconstruction.detach() + tensor([[1.0], [-2.0]])
    return sae, output, loss.terms(sae, output, target, TrainingStatus(NOTHING_DEAD, progress))


def test_the_objective_is_the_error_and_the_penalty():
    _, _, terms = terms_of(ReLULoss(l1=0.1))
    assert {name: term.item() for name, term in terms.items()} == {
        "mse": (1 + 4) / 2,
        "l1": (1.5 + 30 + 100) / 2,
    }
    assert ReLULoss(l1=0.1).coefficients() == {"l1": 0.1}
    assert ReLULoss().sparsity == "l1"


def test_the_dense_objective_is_the_error_alone():
    _, _, terms = terms_of(DenseLoss())
    assert {name: term.item() for name, term in terms.items()} == {"mse": 2.5}
    assert DenseLoss().coefficients() == {}
    assert DenseLoss().sparsity is None


def test_p_falls_from_the_end_of_the_warm_up_to_the_end_of_the_run():
    loss = ReLULoss(p=0.2, warmup=0.1)
    # (progress, p): 1 until 0.1, then linearly to 0.2 at 1: 0.6 half way at 0.55
    for progress, p in ((0.0, 1.0), (0.1, 1.0), (0.55, 0.6), (0.775, 0.4), (1.0, 0.2)):
        sae, output, terms = terms_of(loss, progress)
        features = output.features.values
        expected = torch.autograd.grad(lp(features, sae.W_dec.norm(dim=1), p), features)
        (got,) = torch.autograd.grad(terms["l1"], features, retain_graph=True)
        assert_close(got, expected[0])
        # the coefficient need not be another one while p falls
        assert_close(terms["l1"], l1(features, sae.W_dec.norm(dim=1)))


def test_a_run_that_is_all_warm_up_keeps_p():
    _, output, terms = terms_of(ReLULoss(p=0.2, warmup=1.0), progress=0.99)
    (got,) = torch.autograd.grad(terms["l1"], output.features.values)
    assert_close(got, tensor([[0.5, 5.0, 50.0], [0.5, 5.0, 50.0]]))  # of l1: norm / batch


@pytest.mark.slow
def test_p_annealing_gives_fewer_features_that_explain_as_much():
    ends = []
    for p in (1.0, 0.3):
        head = make_head("relu", loss={"l1": 5e-2, "p": p}, **DENSE_START)
        train(head, 200)
        ends.append((l0(head), head.last_step.terms["mse"].item()))
    (with_l1, error), (annealed, other) = ends
    assert annealed < 0.9 * with_l1
    assert other < 1.1 * error


@pytest.mark.slow
def test_l0_falls_when_l1_rises_over_three_decades():
    reached = []
    for coefficient in (1e-3, 1e-2, 1e-1, 1.0):
        head = make_head("relu", loss={"l1": coefficient}, **DENSE_START)
        train(head, 100)
        reached.append(l0(head))
    assert all(b < 0.9 * a for a, b in zip(reached, reached[1:], strict=False)), reached


@pytest.mark.slow
def test_the_coefficient_is_adjusted_until_l0_is_at_its_target():
    head = make_head("relu", loss={"l1": 2e-2, "target_l0": 5})
    train(head, 400)
    assert l0(head) == pytest.approx(5, rel=0.1)
    now = head.effective_coefficients["l1"]
    assert now == 2e-2 * head.steering
    assert now != 2e-2


def test_the_pre_activation_loss_by_hand():
    sae = hand_made()
    loss = ReLULoss(preact=2.0)
    assert loss.coefficients() == {"l1": 1e-3, "preact": 2.0}
    status = TrainingStatus(tensor([True, True, False]), 0.5)
    term = loss.terms(sae, sae.training_pass(X), X[:, :1], status)["preact"]
    # below 0: 0.5 of feature 0 and 5 of feature 1 on the second token; norms 1 and 10
    assert term.item() == (0.5 * 1 + 5 * 10) / 2
    term.backward()
    assert_close(sae.b_enc.grad, tensor([-0.5, -5.0, 0.0]))
    assert sae.W_dec.grad is None, "a shorter decoder row is no way out"


def test_where_nothing_is_dead_the_pre_activation_loss_is_0():
    sae, output, terms = terms_of(ReLULoss(preact=1.0))
    assert terms["preact"] == 0
    terms["preact"].backward()
    assert not sae.W_enc.grad.any()


@pytest.mark.slow
def test_the_pre_activation_loss_brings_dead_features_back():
    assert preact_revives("relu", {"l1": 3e-2}) >= 18


@pytest.mark.parametrize(("name", "loss"), [("relu", {"l1": 3e-2}), ("dense", {})])
def test_resampling_brings_dead_features_back(name, loss):
    assert revived(make_head(name, loss=loss)) >= 18


def test_decoder_norms_are_free_unless_they_are_fixed():
    free, fixed = make_head("relu"), make_head("relu", fixed_norm=True)
    for head in (free, fixed):
        train(head, 20)
    assert (free.sae.W_dec.detach().norm(dim=1) - 1).abs().max() > 0.01
    assert_close(fixed.sae.W_dec.detach().norm(dim=1), torch.ones(48))


def test_a_head_weighs_its_terms_by_their_coefficients():
    head = make_head("relu", loss={"l1": 0.5, "preact": 0.1})
    head.tokens_since_fired[:10] = 10_000
    head.penalty_factor.fill_(0.25)
    head.steering.fill_(3.0)
    x = activations()[:64]
    loss, terms = head({SITE: x}), head.last_step.terms
    expected = terms["mse"] + 0.5 * 0.25 * 3 * terms["l1"] + 0.1 * terms["preact"]
    assert_close(loss.detach(), expected)
    assert terms["preact"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": -1e-3}, "loss.l1=-0.001: give a "),
        ({"l1": float("inf")}, "loss.l1=inf: give a "),
        ({"l1": float("nan")}, "loss.l1=nan: give a "),
        ({"warmup": -0.1}, "loss.warmup=-0.1: give a "),
        ({"warmup": 1.1}, "loss.warmup=1.1: give a "),
        ({"p": 0.0}, "loss.p=0.0: give a power "),
        ({"p": 1.5}, "loss.p=1.5: give a power "),
        ({"p": 0.5, "l1": 0.0}, "loss.p=0.5 has no effect with loss.l1=0: "),
        ({"preact": -1.0}, "loss.preact=-1.0: give a "),
        ({"target_l0": 0.0}, "loss.target_l0=0.0: give a positive number"),
        ({"target_l0": float("nan")}, "loss.target_l0=nan: give a positive number"),
        ({"l1": 0.0, "target_l0": 5.0}, "loss.l1=0: loss.target_l0=5.0 multiplies it"),
    ],
)
def test_a_value_without_meaning_names_its_setting(settings, message):
    with pytest.raises(UserError) as error:
        ReLULoss(**settings)
    assert str(error.value).startswith(message)


def test_the_ends_of_the_ranges_are_allowed():
    assert ReLULoss(l1=0, warmup=0, p=1).coefficients() == {"l1": 0}
    assert ReLULoss(warmup=1).warmup == 1


def trained_loss(x: torch.Tensor, features: int) -> float:
    """Final loss of a dense autoencoder trained on all of x with Adam."""
    sae = build_sae(DenseConfig(name="dense", features=features), x.shape[1], x.shape[1])
    steps, status = 1000, TrainingStatus(torch.zeros(features).bool(), 0.0)
    adam = torch.optim.Adam(sae.parameters(), lr=2e-2)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1, 0.02, steps)
    for _ in range(steps):
        adam.zero_grad()
        loss = DenseLoss().terms(sae, sae.training_pass(x), x, status)["mse"]
        loss.backward()
        adam.step()
        decay.step()
    return loss.item()


@pytest.mark.slow
def test_a_dense_autoencoder_narrower_than_its_input_cannot_reach_zero_loss():
    # A reconstruction is b_dec plus a mix of the 4 rows of W_dec: whatever the encoder does, it
    # lies in a 4-dimensional plane. The best plane through isotropic data in 8 dimensions leaves
    # the 4 smallest eigenvalues of the covariance, half of the variance of 1 but for chance.
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))  # ascending
    floor = (eigenvalues[:4].sum() / 8).item()
    assert 0.4 < floor < 0.5
    # PCA reaches the floor with a linear encoder, which large biases make of a ReLU one.
    assert 0.9999 * floor < trained_loss(x, features=4) < 1.02 * floor


@pytest.mark.slow
@pytest.mark.parametrize("features", [8, 12])
def test_a_dense_autoencoder_as_wide_as_its_input_reaches_zero_loss(features):
    # With all features active on all of the data both maps are linear and can be inverses.
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    assert trained_loss(x, features) < 1e-4
