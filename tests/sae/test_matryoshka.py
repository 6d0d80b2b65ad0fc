"""Matryoshka: prefixes that reconstruct by themselves, over BatchTopK."""

import pytest
import torch
from superposed import activations, l0, make_head, revived, train
from torch import Generator, tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.sae import TrainingStatus, build_sae
from sae_lightning.sae.matryoshka import MatryoshkaConfig, MatryoshkaLoss
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.topk import TopKConfig


def sizes(features, **settings):
    return MatryoshkaConfig(features=features, k=1, **settings).sizes()


def test_groups_are_shares_of_the_features_and_the_last_is_the_rest():
    assert sizes(32) == [1, 2, 4, 8, 17]
    assert sizes(10_000) == [312, 626, 1250, 2500, 5312]
    assert sizes(10, groups=[0.5]) == [5, 5]


@pytest.mark.parametrize("features", [33, 47, 101, 9_973])
def test_groups_of_odd_numbers_add_up_and_end_where_their_shares_do(features):
    got = sizes(features)
    assert sum(got) == features
    assert all(size > 0 for size in got)
    for i, share in enumerate((1 / 32, 3 / 32, 7 / 32, 15 / 32), start=1):
        assert abs(sum(got[:i]) - share * features) <= 0.5


@pytest.mark.parametrize("groups", [[], [0.0], [-0.1, 0.5], [0.5, 0.5], [0.7, 0.7]])
def test_groups_that_leave_nothing_are_refused(groups):
    with pytest.raises(UserError, match=r"^model\.groups=.*: give positive shares"):
        MatryoshkaConfig(groups=groups)


@pytest.mark.parametrize(("features", "groups"), [(16, [1 / 32]), (3, [0.5, 0.49])])
def test_a_group_without_features_is_refused(features, groups):
    with pytest.raises(UserError, match=rf"one group would get none of model\.features={features}"):
        MatryoshkaConfig(features=features, k=1, groups=groups)


def hand_made():
    """One input that all features read, four features in groups of 1, 1 and 2, one output."""
    config = MatryoshkaConfig(name="matryoshka", features=4, k=3, groups=[0.25, 0.25])
    sae = build_sae(config, 1, 1)
    with torch.no_grad():
        sae.W_enc.copy_(tensor([[1.0, 2.0, -1.0, 3.0]]))
        sae.W_dec.copy_(tensor([[1.0], [10.0], [100.0], [1000.0]]))
        sae.b_dec.fill_(0.5)
    return sae


# pre-activations (1, 2, -1, 3) and (-2, -4, 2, -6): four are positive, six may fire
X = tensor([[1.0], [-2.0]])


def test_prefixes_add_up_by_hand():
    this = hand_made().training_pass(X)
    assert_close(this.features.values.detach(), tensor([[1.0, 2, 0, 3], [0, 0, 2, 0]]))
    first, second = this.prefixes
    assert first.tolist() == [[1.5], [0.5]]
    assert second.tolist() == [[21.5], [0.5]]
    assert this.reconstruction.tolist() == [[3021.5], [200.5]]


def test_the_objective_is_the_sum_of_the_errors_with_equal_weights():
    sae = hand_made()
    this, target = sae.training_pass(X), tensor([[0.5], [0.5]])
    terms = MatryoshkaLoss().terms(sae, this, target, TrainingStatus(torch.zeros(4).bool(), 0.5))
    # errors: whole 3021, 200; first 1, 0; second 21, 0
    assert terms["mse"].item() == (3021**2 + 200**2) / 2
    assert terms["prefixes"].item() == (1 + 21**2) / 2
    assert MatryoshkaLoss().coefficients() == {"auxk": 1 / 32, "prefixes": 1.0}
    assert MatryoshkaLoss(auxk=0).coefficients() == {"prefixes": 1.0}


def test_early_features_learn_from_all_prefixes_and_late_ones_from_the_whole():
    sae = hand_made()
    this, target = sae.training_pass(X), torch.zeros(2, 1)
    terms = MatryoshkaLoss().terms(sae, this, target, TrainingStatus(torch.zeros(4).bool(), 0.5))
    terms["prefixes"].backward()
    # d/dW_dec = f x error, mean over 2 tokens x 2: f_0 = 1: 1.5 + 21.5; f_1 = 2: 21.5
    assert_close(sae.W_dec.grad, tensor([[23.0], [43.0], [0.0], [0.0]]))


@torch.no_grad()
def test_the_whole_is_a_batch_topk():
    x = activations()[:50]
    matryoshka = build_sae(MatryoshkaConfig(name="matryoshka", features=47, k=5), 16, 16)
    plain = build_sae(TopKConfig(name="batch_topk", features=47, k=5), 16, 16)
    assert torch.equal(matryoshka.W_dec, plain.W_dec)
    one, other = matryoshka.training_pass(x), plain.training_pass(x)
    assert torch.equal(one.features.values, other.features.values)
    assert torch.equal(one.pre.values, other.pre.values)
    assert_close(one.reconstruction, other.reconstruction)
    assert torch.equal(matryoshka.threshold, plain.threshold)
    assert torch.equal(matryoshka(x).features, plain(x).features)
    status = TrainingStatus(torch.arange(47) < 9, 0.5)
    terms = MatryoshkaLoss().terms(matryoshka, one, x, status)
    for name, term in AuxKLoss().terms(plain, other, x, status).items():
        assert_close(terms[name], term)


@torch.no_grad()
@pytest.mark.parametrize("features", [33, 47])
def test_each_prefix_is_the_reconstruction_by_its_features_alone(features):
    x = torch.randn(20, 16, generator=Generator().manual_seed(0))
    sae = build_sae(MatryoshkaConfig(name="matryoshka", features=features, k=5), 16, 16)
    this, end = sae.training_pass(x), 0
    wholes = [*this.prefixes, this.reconstruction]
    assert len(wholes) == 5
    for size, reached in zip(sae.config.sizes(), wholes, strict=True):
        end += size
        expected = this.features.values[:, :end] @ sae.W_dec[:end] + sae.b_dec
        assert_close(reached, expected)
    assert_close(this.reconstruction, sae.decode(this.features))


@torch.no_grad()
def test_prefixes_of_a_skip_transcoder_have_its_skip_connection():
    config = MatryoshkaConfig(name="matryoshka", features=4, k=3, groups=[0.25, 0.25], skip=True)
    sae = build_sae(config, 1, 1)
    sae.load_state_dict(hand_made().state_dict() | {"W_skip": tensor([[7.0]])})
    this = sae.training_pass(X)
    assert this.prefixes[0].tolist() == [[8.5], [-13.5]]
    assert this.reconstruction.tolist() == [[3028.5], [186.5]]


@pytest.mark.slow
def test_early_prefixes_explain_more_than_those_of_a_batch_topk():
    x, errors = activations(2048, seed=1), {}
    for name in ("matryoshka", "batch_topk"):
        head = make_head(name)
        train(head, 150)
        with torch.no_grad():
            early = head.sae.encode(x)[:, :10]
            error = (early @ head.sae.W_dec[:10] + head.sae.b_dec - x).square().mean()
        errors[name] = error.item()
        assert l0(head) == pytest.approx(3, rel=0.1)
    assert errors["matryoshka"] < 0.9 * errors["batch_topk"]


def test_resampling_brings_dead_features_back():
    assert revived(make_head("matryoshka", loss={"auxk": 0.0})) >= 12
