"""All architectures: initialisation, folding of the normalisation, independent tokens."""

import pytest
import torch
from torch import Generator, tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.sae import ARCHITECTURES, SAEConfig, build_sae, count_parameters


def test_it_starts_as_anthropic_advises():
    sae = build_sae(SAEConfig(features=50, decoder_norm=0.1, start_bias=0), 8, 8)
    assert_close(sae.W_dec.norm(dim=1), torch.full((50,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr(), "equal at the start, not tied"
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


@pytest.mark.parametrize(("bias", "share"), [(0, 0.5), (-1, 0.1587), (-2, 0.02275)])
def test_the_bias_at_the_start_says_what_share_of_the_features_fires(bias, share):
    # normalised input in many dimensions: pre-activations are normal, with a standard deviation of
    # decoder_norm; P(z > 1) = 0.1587, P(z > 2) = 0.02275
    sae = build_sae(SAEConfig(features=4000, decoder_norm=0.3, start_bias=bias), 256, 256)
    x = torch.randn(1000, 256, generator=Generator().manual_seed(0))
    assert (sae.encode(x) > 0).float().mean() == pytest.approx(share, rel=0.05)


def test_decoder_norm_sets_the_length_of_every_row():
    sae = build_sae(SAEConfig(features=50, decoder_norm=0.7), 8, 8)
    assert_close(sae.W_dec.norm(dim=1), torch.full((50,), 0.7))


def test_directions_at_the_start_are_spread_evenly():
    # The mean of n unit vectors in random directions has length about 1/sqrt(n): 0.01 here.
    rows = build_sae(SAEConfig(features=10_000, decoder_norm=1), 8, 8).W_dec
    assert rows.mean(dim=0).norm() < 0.03
    # E[r_i r_j] = 1/d on the diagonal, 0 off it.
    assert_close(rows.T @ rows / 10_000, torch.eye(8) / 8, atol=0.01, rtol=0)


def test_a_feature_is_a_column_of_the_encoder_and_a_row_of_the_decoder():
    sae = build_sae(SAEConfig(features=5), 3, 7)
    shapes = {name: tuple(weight.shape) for name, weight in sae.named_parameters()}
    assert shapes == {"W_enc": (3, 5), "b_enc": (5,), "W_dec": (5, 7), "b_dec": (7,)}
    # A transcoder's encoder has directions of its own, of the same length.
    assert_close(sae.W_enc.norm(dim=0), torch.ones(5))
    output = sae(torch.randn(2, 3))
    assert output.features.shape == (2, 5)
    assert output.reconstruction.shape == (2, 7)


def test_the_seed_fixes_the_weights_and_nothing_else_does():
    def weights(seed, before):
        torch.manual_seed(before)  # the state of the global generator must not matter
        return build_sae(SAEConfig(features=5, seed=seed), 3, 3).W_dec

    assert torch.equal(weights(1, before=0), weights(1, before=99))
    assert not torch.equal(weights(1, before=0), weights(2, before=0))
    given = build_sae(SAEConfig(features=5), 3, 3, Generator().manual_seed(1)).W_dec
    assert torch.equal(given, weights(1, before=0))


@torch.no_grad()
def test_folding_by_hand():
    # z = (x - 3) / 2 and x_hat = z_hat x 5 + 7; one feature f = relu(4 z + 1), z_hat = 6 f + 8:
    # f = relu(2 x - 6 + 1) and x_hat = 30 f + 40 + 7.
    sae = build_sae(SAEConfig(features=1), 1, 1)
    values = {"W_enc": [[4.0]], "b_enc": [1.0], "W_dec": [[6.0]], "b_dec": [8.0]}
    sae.load_state_dict({name: tensor(value) for name, value in values.items()})
    folded = sae.fold(tensor([3.0]), tensor(2.0), tensor([7.0]), tensor(5.0))
    got = {name: weight.tolist() for name, weight in folded.items()}
    assert got == {"W_enc": [[2.0]], "b_enc": [-5.0], "W_dec": [[30.0]], "b_dec": [47.0]}


def noisy(name: str, d_in: int, d_out: int, **settings):
    """An SAE of 40 features in which no parameter is 0, and random activations for it."""
    generator = Generator().manual_seed(0)
    sae = build_sae(ARCHITECTURES[name].config(name=name, features=40, **settings), d_in, d_out)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        if name in ("batch_topk", "matryoshka"):
            sae.threshold.fill_(0.7)
    return sae, torch.randn(100, d_in, generator=generator)


def settings_of(name: str) -> dict:
    return {"k": 5} if "k" in ARCHITECTURES[name].config.__dataclass_fields__ else {}


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(16, 16), (16, 5), (5, 16)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folded_weights_do_for_raw_activations_what_the_others_do_for_normalised(
    name, d_in, d_out, skip
):
    settings = settings_of(name) | {"skip": skip}
    if name == "matryoshka":
        settings["groups"] = [0.25]
    sae, z = noisy(name, d_in, d_out, **settings)
    generator = Generator().manual_seed(1)
    in_mean = 5 * torch.randn(d_in, generator=generator)
    out_mean = 5 * torch.randn(d_out, generator=generator)
    in_scale, out_scale = tensor(3.7), tensor(0.21)
    raw = z * in_scale + in_mean

    output = sae((raw - in_mean) / in_scale)
    expected = output.reconstruction * out_scale + out_mean
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    folded = build_sae(sae.config, d_in, d_out)
    folded.load_weights(sae.fold(in_mean, in_scale, out_mean, out_scale))

    # Sums of up to 40 terms of size 10 to 100: float32 leaves about 1e-5 of that.
    assert (output.features > 0).any()
    assert_close(folded(raw).features, output.features, rtol=1e-5, atol=5e-5)
    assert_close(folded(raw).reconstruction, expected, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(before[name], w) for name, w in sae.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inference_is_per_token(name):
    settings = settings_of(name) | ({"groups": [0.25]} if name == "matryoshka" else {})
    sae, x = noisy(name, 16, 16, **settings)
    sae.training_pass(x)
    whole = sae(x)
    assert torch.equal(whole.features, sae.encode(x))
    assert torch.equal(whole.reconstruction, sae.reconstruct(x, whole.features))
    assert (whole.features >= 0).all()
    order = torch.randperm(100, generator=Generator().manual_seed(2))
    parts = [sae(part) for part in x[order].split(7)]
    # another batch size is another order of summation
    features = torch.cat([part.features for part in parts])
    assert_close(features, whole.features[order], rtol=1e-5, atol=1e-5)
    reconstruction = torch.cat([part.reconstruction for part in parts])
    assert_close(reconstruction, whole.reconstruction[order], rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_looking_at_an_sae_changes_nothing(name):
    settings = settings_of(name) | ({"groups": [0.25]} if name == "matryoshka" else {})
    sae, x = noisy(name, 16, 16, **settings)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae(x), sae.encode(x), sae.weights()
    after = sae.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_make_the_same_sae_again(name):
    settings = settings_of(name) | ({"groups": [0.25]} if name == "matryoshka" else {})
    sae, x = noisy(name, 16, 16, **settings)
    again = build_sae(sae.config, 16, 16, Generator().manual_seed(99))
    again.load_weights(sae.weights())
    # a threshold goes through a logarithm and back
    assert_close(again(x).features, sae(x).features, rtol=1e-6, atol=0)
    assert_close(again(x).reconstruction, sae(x).reconstruction)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_skip_connection_is_added_to_what_features_say(name):
    settings = settings_of(name) | ({"groups": [0.25]} if name == "matryoshka" else {})
    sae, x = noisy(name, 16, 5, skip=True, **settings)
    this = sae.training_pass(x)
    decoded = this.features.values @ sae.W_dec + sae.b_dec
    assert_close(this.reconstruction, decoded + x @ sae.W_skip, rtol=1e-5, atol=1e-4)
    output = sae(x)
    decoded = output.features @ sae.W_dec + sae.b_dec
    assert_close(output.reconstruction, decoded + x @ sae.W_skip, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restarted_features_have_no_bias_and_others_are_as_they_were(name):
    settings = settings_of(name) | ({"groups": [0.25]} if name == "matryoshka" else {})
    sae, x = noisy(name, 16, 5, **settings)
    fresh = build_sae(sae.config, 16, 5)
    before = {each: p.detach().clone() for each, p in sae.named_parameters()}
    which, others = tensor([3, 8]), [i for i in range(40) if i not in (3, 8)]
    sae.restart(which, x[:2], x[2:4, :5])
    assert torch.equal(sae.W_enc[:, which], x[:2].T)
    assert torch.equal(sae.W_dec[which], x[2:4, :5])
    assert set(sae.per_feature) == set(before) - {"b_dec"}, "all of a feature"
    for each, dim in sae.per_feature.items():
        now, was = getattr(sae, each).movedim(dim, 0), before[each].movedim(dim, 0)
        assert torch.equal(now[others], was[others])
        if each not in ("W_enc", "W_dec"):
            expected = 0 * was if each == "b_enc" else getattr(fresh, each)
            assert torch.equal(now[which], expected[which])
    assert torch.equal(sae.b_dec, before["b_dec"])


def test_a_row_of_fixed_norm_turns_and_is_not_stretched():
    sae, x = noisy("relu", 16, 5, decoder_norm=0.3)
    sae.fix_norms()
    assert_close(sae.W_dec.norm(dim=1).detach(), torch.full((40,), 0.3))
    sae.W_dec.grad = torch.randn(40, 5, generator=Generator().manual_seed(3))
    whole, rows = sae.W_dec.grad.clone(), sae.W_dec.detach() / 0.3
    sae.project_gradient()
    assert_close((sae.W_dec.grad * rows).sum(dim=1), torch.zeros(40), atol=1e-6, rtol=0)
    # what was taken away points along the row: Pythagoras
    along = (whole * rows).sum(dim=1)
    assert_close(sae.W_dec.grad.norm(dim=1) ** 2 + along**2, whole.norm(dim=1) ** 2)


def test_the_radial_part_by_hand():
    # row (3, 4) / 5; gradient (1, 2) has 11/5 along it, (33, 44) / 25: left (-0.32, 0.24)
    sae = build_sae(SAEConfig(features=1), 2, 2)
    with torch.no_grad():
        sae.W_dec.copy_(tensor([[3.0, 4.0]]))
    sae.W_dec.grad = tensor([[1.0, 2.0]])
    sae.project_gradient()
    assert_close(sae.W_dec.grad, tensor([[-0.32, 0.24]]))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_an_sae_learns_is_counted_without_building_it(name, skip):
    settings = settings_of(name) | ({"groups": [0.25]} if name == "matryoshka" else {})
    sae, _ = noisy(name, 16, 5, skip=skip, **settings)
    assert count_parameters(sae.config, 16, 5) == sum(
        parameter.numel() for parameter in sae.parameters()
    )


def test_an_unknown_architecture_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"model\.name=topkk: .* choose from relu, dense"):
        build_sae(SAEConfig(name="topkk"), 4, 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"features": 0}, "model.features=0"),
        ({"features": -3}, "model.features=-3"),
        ({"decoder_norm": 0.0}, "model.decoder_norm=0.0"),
        ({"decoder_norm": float("nan")}, "model.decoder_norm=nan"),
        ({"decoder_norm": float("inf")}, "model.decoder_norm=inf"),
    ],
)
def test_a_value_without_meaning_names_its_setting(setting, message):
    with pytest.raises(UserError) as error:
        SAEConfig(**setting)
    assert str(error.value).startswith(message)


def test_every_architecture_names_itself_as_saelens_does():
    assert {row.network.architecture for row in ARCHITECTURES.values()} == {
        "standard",
        "topk",
        "jumprelu",
        "gated",
    }
