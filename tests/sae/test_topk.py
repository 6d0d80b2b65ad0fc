"""TopK: k features a token, by hand; a feature that is off gets gradients from AuxK alone."""

import pytest
import torch
from superposed import SITE, activations, make_head, revived, train
from torch import tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.sae import TrainingStatus, build_sae
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.topk import TopKConfig


def hand_made(k=2):
    """Two inputs, four features, one output."""
    sae = build_sae(TopKConfig(name="topk", features=4, k=k), 2, 1)
    sae.load_weights(
        {
            "W_enc": tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 3.0, -1.0]]),
            "b_enc": tensor([0.5, 0.0, 0.0, 0.0]),
            "W_dec": tensor([[1.0], [10.0], [100.0], [1000.0]]),
            "b_dec": tensor([0.25]),
        }
    )
    return sae


# x = (1, 2):    x W_enc + b_enc = (1.5, 2, 6, -3): the two largest are 2 and 6
# x = (1, -2):   (1.5, 2, -6, 1): 1.5 and 2
# x = (-3, 1):   (-2.5, -6, 3, 2): 3 and 2
# x = (-1, .5):  (-0.5, -2, 1.5, 0.5): 1.5 and 0.5
# x = (-.4, 0):  (0.1, -0.8, 0, 0.4): 0.1 and 0.4
# x = (-1, 0):   (-0.5, -2, 0, 1): one is positive, and one alone fires
X = tensor([[1.0, 2.0], [1.0, -2.0], [-3.0, 1.0], [-1.0, 0.5], [-0.4, 0.0], [-1.0, 0.0]])
FEATURES = tensor(
    [
        [0.0, 2.0, 6.0, 0.0],
        [1.5, 2.0, 0.0, 0.0],
        [0.0, 0.0, 3.0, 2.0],
        [0.0, 0.0, 1.5, 0.5],
        [0.1, 0.0, 0.0, 0.4],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


@torch.no_grad()
def test_the_k_largest_fire_by_hand():
    sae = hand_made()
    assert_close(sae.encode(X), FEATURES)
    # 2 x 10 + 6 x 100 + 0.25; 1.5 + 20 + 0.25; ...
    expected = tensor([[620.25], [21.75], [2300.25], [650.25], [400.35], [1000.25]])
    assert_close(sae(X).reconstruction, expected)


@torch.no_grad()
def test_training_and_inference_are_the_same():
    sae = hand_made()
    this = sae.training_pass(X)
    assert torch.equal(this.features.values, sae.encode(X))
    assert torch.equal(this.reconstruction, sae(X).reconstruction)
    assert torch.equal(this.pre.values, sae.pre_activations(X))


@torch.no_grad()
def test_equal_strengths_are_not_all_kept():
    sae = hand_made(k=1)
    sae.W_enc.fill_(1.0)
    sae.b_enc.zero_()
    assert (sae.encode(X[:1]) > 0).sum() == 1


def test_where_a_feature_is_off_its_weights_have_no_gradient():
    sae = hand_made(k=1)
    # 6 of feature 2, and 2 of feature 1: 0 and 3 are off on both tokens
    this = sae.training_pass(X[:2])
    this.reconstruction.sum().backward()
    assert_close(this.features.values.detach(), tensor([[0.0, 0, 6, 0], [0, 2, 0, 0]]))
    # d x_hat / d b_enc = W_dec on the token where the feature is on
    assert_close(sae.b_enc.grad, tensor([0.0, 10, 100, 0]))
    # ... and times x for W_enc
    assert_close(sae.W_enc.grad, tensor([[0.0, 10, 100, 0], [0, -20, 200, 0]]))
    assert_close(sae.W_dec.grad, tensor([[0.0], [2], [6], [0]]))


def test_the_objective_is_the_error_and_auxk():
    sae, dead = hand_made(), tensor([True, False, False, True])
    this = sae.training_pass(X)
    target = this.reconstruction.detach() + tensor([[1.0], [-1], [1], [-1], [1], [-1]])
    terms = AuxKLoss().terms(sae, this, target, TrainingStatus(dead, 0.5))
    assert terms["mse"] == 1
    assert set(terms) == {"mse", "auxk"}
    assert AuxKLoss().coefficients() == {"auxk": 1 / 32}
    # half of a width of 1 is still one feature; of 1.5, -3 of the first token the largest is 1.5:
    # 1.5 x 1 against a residual of 1; then (1.5; 1) -> 1.5, 2, 0.5, 0.4 x 1000, 1000
    given = [1.5, 1.5, 2000.0, 500.0, 400.0, 1000.0]
    left = sum((a - b) ** 2 for a, b in zip(given, [1, -1, 1, -1, 1, -1], strict=True)) / 6
    assert terms["auxk"].item() == pytest.approx(left)  # the residual's variance is 1


def test_without_auxk_there_is_no_such_term():
    sae = hand_made()
    loss = AuxKLoss(auxk=0)
    terms = loss.terms(
        sae, sae.training_pass(X), X[:, :1], TrainingStatus(torch.ones(4).bool(), 0.5)
    )
    assert set(terms) == {"mse"}
    assert loss.coefficients() == {}


def test_auxk_k_decides_how_many_dead_features_help():
    sae, dead = hand_made(), tensor([True, True, False, False])
    this = sae.training_pass(X[:2])
    # dead ones have pre-activations 1.5 and 2 on both tokens: 1.5 x 1 + 2 x 10 = 21.5, or 20
    residual = tensor([[21.5], [-21.5]])
    target = this.reconstruction.detach() + residual
    for k, left in {1: (1.5**2 + 41.5**2) / 2, 2: 43.0**2 / 2}.items():
        term = AuxKLoss(auxk_k=k).terms(sae, this, target, TrainingStatus(dead, 0.5))["auxk"]
        assert term.item() == pytest.approx(left / 21.5**2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_auxk_brings_dead_features_back(name):
    back, changed = {}, {}
    for auxk in (0.0, 1 / 32):
        head = make_head(name, loss={"auxk": auxk}, dead_window=512)
        with torch.no_grad():
            head.sae.W_enc[:, 24:] *= 0.02  # too weak to be among the largest
        before = head.sae.W_enc[:, 24:].detach().clone()
        train(head, 150)
        back[auxk] = int((~head.dead[24:]).sum())
        changed[auxk] = int((head.sae.W_enc[:, 24:] != before).any(dim=0).sum())
    assert back[0] <= 6
    assert back[1 / 32] >= back[0] + 6
    assert changed[1 / 32] == 24


def test_auxk_moves_the_dead_and_nothing_else():
    head = make_head("topk", loss={"auxk": 1.0}, dead_window=100)
    head.tokens_since_fired[30:] = 1000
    head({SITE: activations()[:64]})
    head.sae.zero_grad()
    this = head.sae.training_pass(activations()[:64])
    status = TrainingStatus(head.dead, 0.5)
    head.loss.terms(head.sae, this, activations()[:64], status)["auxk"].backward()
    sae, dead = head.sae, head.dead
    assert dead.any() and not dead.all()
    for gradient in (sae.W_enc.grad.T, sae.b_enc.grad[:, None], sae.W_dec.grad):
        assert not gradient[~dead].any()
        assert gradient[dead].any(dim=1).all()
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()


def test_resampling_brings_dead_features_back():
    assert revived(make_head("topk", loss={"auxk": 0.0})) >= 12


def test_decoder_rows_stay_at_their_norm():
    for settings in ({}, {"decoder_norm": 0.5}):
        head = make_head("topk", **settings)
        before = head.sae.W_dec.detach().clone()
        train(head, 20)
        norm = settings.get("decoder_norm", 1.0)
        assert_close(head.sae.W_dec.detach().norm(dim=1), torch.full((48,), norm))
        assert (head.sae.W_dec - before).abs().max() > 0.01 * norm
    head = make_head("topk", fixed_norm=False)
    train(head, 20)
    assert (head.sae.W_dec.detach().norm(dim=1) - 1).abs().max() > 0.01


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_k_without_meaning_names_its_setting(k):
    message = rf"^model\.k={k}: give a number from 1 to model\.features=4"
    with pytest.raises(UserError, match=message):
        TopKConfig(features=4, k=k)


@pytest.mark.parametrize("settings", [{"auxk": -1.0}, {"auxk": float("nan")}, {"auxk_k": 0}])
def test_an_auxk_without_meaning_names_its_setting(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=rf"^loss\.{name}={value}: give "):
        AuxKLoss(**settings)


def test_features_for_an_auxk_that_is_off_are_refused():
    with pytest.raises(UserError, match=r"^loss\.auxk_k=3 has no effect with loss\.auxk=0: "):
        AuxKLoss(auxk=0.0, auxk_k=3)
