"""Each control is what it says it is, after real updates and by hand."""

from types import SimpleNamespace

import pytest
import torch
from superposed import SITE, activations, make_head, train
from torch import Generator
from torch.nn.functional import normalize
from torch.testing import assert_close

from sae_lightning.sae import ARCHITECTURES
from sae_lightning.sae.controls import (
    FROZEN_WEIGHTS,
    Control,
    limit_turn,
    list_principal_directions,
    permute_dimensions,
)
from sae_lightning.training.callbacks.keep_control import KeepControl
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import Products

D = 16


def make_control(name: str, control: Control | None, **settings):
    """A head with clipping, warm-up and, where there is a coefficient, a target for L0."""
    has_target = hasattr(ARCHITECTURES[name].loss, "target_l0")
    return make_head(
        name, loss={"target_l0": 3.0} if has_target else {}, control=control, **settings
    )


def begin(head, x) -> None:
    """Do what happens before the first update of a run that reads x [n, d]."""
    stream = SimpleNamespace(peek=lambda n: {SITE: x[:n]})
    trainer = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(stream=stream))
    KeepControl().on_train_start(trainer, SAEModule([head], batch=1, steps=1))


def parameters(head) -> dict:
    return {name: x.detach().clone() for name, x in head.sae.named_parameters()}


@pytest.mark.parametrize("control", FROZEN_WEIGHTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_frozen_weights_keep_every_bit_and_the_others_train(name, control):
    for fixed_norm, products in ((True, Products.dense), (False, Products.sparse)):
        head = make_control(name, control, fixed_norm=fixed_norm)
        head.products = products
        start = parameters(make_control(name, None, fixed_norm=fixed_norm))
        if control is Control.frozen_encoder:
            start["W_enc"] = parameters(head)["W_enc"]  # of norm 1, see the next test
        if control is Control.pca:
            begin(head, activations())
            start = parameters(head)
        train(head, steps=15)
        for key, weight in head.sae.named_parameters():
            frozen = key in FROZEN_WEIGHTS[control]
            assert torch.equal(weight, start[key]) == frozen, key
        names = [key for group in head.group_parameters() for key in group]
        assert {*names} == {*start} - {*FROZEN_WEIGHTS[control]}


def test_a_frozen_encoder_has_the_directions_of_its_sae_and_the_norm_1():
    """At JumpReLU's norm of 0.1, which training would raise, biases alone decide what fires."""
    heads = [make_control("jumprelu", control) for control in (None, Control.frozen_encoder)]
    trained, frozen = (head.sae.W_enc.detach() for head in heads)
    assert_close(frozen, 10 * trained)
    assert_close(frozen.norm(dim=0), torch.ones(frozen.shape[1]))
    assert torch.equal(heads[0].sae.W_dec, heads[1].sae.W_dec)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "topk"])  # with free and with fixed norms
def test_soft_frozen_rows_turn_as_far_as_they_may(name):
    least = {}
    for control in (None, Control.soft_frozen_decoder):
        head = make_control(name, control)
        start = normalize(head.sae.W_dec.detach())
        head.optim.lr = 3e-2
        train(head, steps=60)
        cosines = (normalize(head.sae.W_dec.detach()) * start).sum(dim=1)
        least[control] = cosines.min().item()
        norms = head.sae.W_dec.detach().norm(dim=1)
        if head.sae.config.fixed_norm:
            assert_close(norms, torch.full_like(norms, head.sae.config.decoder_norm))
    assert least[None] < 0.7
    assert least[Control.soft_frozen_decoder] == pytest.approx(0.8, abs=1e-6)


def test_a_row_is_turned_back_by_hand():
    # in turn: at a cosine of 0, of 0.6, of -1, of 0.97, and no row at all
    rows = torch.tensor([[0.0, 5.0], [3.0, -4.0], [-2.0, 0.0], [4.0, 1.0], [0.0, 0.0]])
    expected = [[4.0, 3.0], [4.0, -3.0], [1.6, 0.0], [4.0, 1.0], [0.0, 0.0]]
    turned = limit_turn(rows, torch.tensor([[1.0, 0.0]]).expand(5, 2))
    assert_close(turned, torch.tensor(expected))
    assert torch.equal(turned[3], rows[3])


def test_shuffling_keeps_marginals_and_removes_correlations():
    """Two dimensions with a correlation of 1: afterwards its standard deviation is 1 / sqrt(n)."""
    n, random = 10_000, Generator().manual_seed(3)
    x = torch.randn(n, 1, generator=random).expand(n, 2)
    shuffled = permute_dimensions(x, random)
    assert torch.equal(shuffled.sort(dim=0).values, x.sort(dim=0).values)
    assert torch.corrcoef(shuffled.T)[0, 1].abs() < 4 / n**0.5
    # elements of a row come from the same token in one of n cases, as with independent permutations
    numbers = torch.arange(4).repeat(3, 1).T
    draws = torch.stack([permute_dimensions(numbers, random) for _ in range(4000)])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (draws[..., one] == draws[..., other]).float().mean() == pytest.approx(
            1 / 4, abs=0.02
        )
    assert_close(draws[:, 0, 0].bincount() / 4000, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_a_head_trains_on_shuffled_activations_from_its_own_random_numbers():
    head, other = (make_control("topk", Control.shuffled_activations) for _ in range(2))
    state, x = head.generator_state.clone(), activations()[:512]
    torch.manual_seed(1)  # must not matter
    targets = []
    for each in (head, head, other):
        each({SITE: x})
        targets.append(each.last_step.target)
    assert torch.equal(targets[0].sort(dim=0).values, x.sort(dim=0).values)
    assert (targets[0] != x).float().mean() > 0.9
    assert torch.equal(targets[0], targets[2]) and not torch.equal(targets[0], targets[1])
    assert not torch.equal(head.generator_state, state)
    head.load_state_dict(other.state_dict())  # as on resuming
    head({SITE: x})
    assert torch.equal(head.last_step.target, targets[1])
    assert_close(head.reconstruct_raw(x).features, head.sae(x).features)  # scored on real ones


def known_axes():
    """Activations with known principal axes [D, D] and variances [D], falling, and a mean."""
    axes = torch.linalg.qr(torch.randn(D, D, generator=Generator().manual_seed(0))).Q
    lengths = torch.arange(D, 0, -1.0)
    mean = torch.linspace(-5, 5, D)
    x = torch.cat([lengths[:, None] * axes, -lengths[:, None] * axes])
    return x + mean, axes, lengths.square() / D, mean


@pytest.mark.parametrize("name", ["relu", "gated"])
@pytest.mark.parametrize(("axes_kept", "features"), [(3, 6), (16, 32), (16, 48)])
def test_principal_components_explain_what_they_should(axes_kept, features, name):
    """Each activation lies on one axis, so that of the 2 features of each kept axis one fires:
    the explained variance is the share of the kept axes."""
    x, axes, variances, mean = known_axes()
    head = make_head(name, control=Control.pca, features=features, start_bias=0.0)
    head.in_mean += 1  # normalisation need not be exact: the rest of the mean goes into b_dec
    head.in_scale.fill_(2.0)
    head.out_mean, head.out_scale = head.in_mean, head.in_scale
    begin(head, x)
    rows, used = head.sae.W_dec.detach(), 2 * axes_kept
    assert_close(rows, head.sae.W_enc.detach().T)
    assert_close((rows[0:used:2] * axes[:axes_kept]).sum(dim=1).abs(), torch.ones(axes_kept))
    assert torch.equal(rows[0:used:2], -rows[1:used:2])
    assert not rows[used:].any()
    output = head.reconstruct_raw(x)
    assert not output.features[:, used:].any()
    unexplained = (output.reconstruction - x).square().sum() / (x - mean).square().sum()
    share = variances[:axes_kept].sum() / variances.sum()
    assert_close(1 - unexplained, share, atol=1e-5, rtol=0)


def test_features_beyond_twice_the_width_never_fire():
    for name in ("relu", "topk", "jumprelu", "gated"):
        head = make_control(name, Control.pca, features=40)
        begin(head, activations())
        train(head, steps=15)
        features = head.sae(activations(512, seed=1)).features
        assert features[:, : 2 * D].any() and not features[:, 2 * D :].any(), name


def test_each_axis_points_where_its_largest_element_is_positive():
    directions = list_principal_directions(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    assert_close(directions, torch.tensor([[0.6, 0.8], [-0.6, -0.8], [0.8, -0.6], [-0.8, 0.6]]))
