"""The network: its start, its equation, folding the normalisation in, and what it cannot do."""

import pytest
import torch
from torch import Generator, tensor
from torch.testing import assert_close

from sae_lightning.errors import UserError
from sae_lightning.sae import ARCHITECTURES, SAE, SAEConfig, build
from sae_lightning.sae.relu import DenseLoss


def test_it_starts_as_anthropic_advises():
    sae = build(SAEConfig(features=50, decoder_norm=0.1), 8, 8)
    assert_close(sae.W_dec.norm(dim=1), torch.full((50,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr(), "equal at the start, not tied"
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_decoder_norm_sets_the_length_of_every_row():
    sae = build(SAEConfig(features=50, decoder_norm=0.7), 8, 8)
    assert_close(sae.W_dec.norm(dim=1), torch.full((50,), 0.7))


def test_directions_at_the_start_are_spread_evenly():
    # The mean of n unit vectors in random directions has length about 1/sqrt(n): 0.01 here.
    rows = build(SAEConfig(features=10_000, decoder_norm=1), 8, 8).W_dec
    assert rows.mean(dim=0).norm() < 0.03
    # E[r_i r_j] = 1/d on the diagonal, 0 off it.
    assert_close(rows.T @ rows / 10_000, torch.eye(8) / 8, atol=0.01, rtol=0)


def test_a_feature_is_a_column_of_the_encoder_and_a_row_of_the_decoder():
    sae = build(SAEConfig(features=5), 3, 7)
    shapes = {name: tuple(weight.shape) for name, weight in sae.named_parameters()}
    assert shapes == {"W_enc": (3, 5), "b_enc": (5,), "W_dec": (5, 7), "b_dec": (7,)}
    # A transcoder's encoder has directions of its own, of the same length.
    assert_close(sae.W_enc.norm(dim=0), torch.full((5,), 0.1))
    output = sae(torch.randn(2, 3))
    assert output.features.shape == (2, 5)
    assert output.reconstruction.shape == (2, 7)


def test_the_seed_fixes_the_weights_and_nothing_else_does():
    def weights(seed, before):
        torch.manual_seed(before)  # the state of the global generator must not matter
        return build(SAEConfig(features=5, seed=seed), 3, 3).W_dec

    assert torch.equal(weights(1, before=0), weights(1, before=99))
    assert not torch.equal(weights(1, before=0), weights(2, before=0))
    given = build(SAEConfig(features=5), 3, 3, Generator().manual_seed(1)).W_dec
    assert torch.equal(given, weights(1, before=0))


def hand_made() -> SAE:
    """d_in = 2, three features, d_out = 1."""
    sae = build(SAEConfig(features=3), 2, 1)
    sae.load_state_dict(
        {
            "W_enc": tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]),
            "b_enc": tensor([0.5, -1.0, 0.0]),
            "W_dec": tensor([[1.0], [10.0], [100.0]]),
            "b_dec": tensor([0.25]),
        }
    )
    return sae


@torch.no_grad()
def test_relu_by_hand():
    # x = (1, 2):    x W_enc + b_enc = ( 1 + .5, 4 - 1, -1 + 2) = ( 1.5,  3,  1)
    # x = (-1, -2):                    (-1 + .5, -4 - 1, 1 - 2) = (-0.5, -5, -1) -> 0
    sae, x = hand_made(), tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert_close(sae.encode(x), tensor([[1.5, 3.0, 1.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(sae(x).features, sae.encode(x))
    # 1.5 x 1 + 3 x 10 + 1 x 100 + 0.25;  nothing fires: b_dec
    assert_close(sae(x).reconstruction, tensor([[131.75], [0.25]]))


@torch.no_grad()
def test_folding_by_hand():
    # z = (x - 3) / 2 and x_hat = z_hat x 5 + 7; one feature f = relu(4 z + 1), z_hat = 6 f + 8:
    # f = relu(2 x - 6 + 1) and x_hat = 30 f + 40 + 7.
    sae = build(SAEConfig(features=1), 1, 1)
    values = {"W_enc": [[4.0]], "b_enc": [1.0], "W_dec": [[6.0]], "b_dec": [8.0]}
    sae.load_state_dict({name: tensor(value) for name, value in values.items()})
    folded = sae.fold(tensor([3.0]), tensor(2.0), tensor([7.0]), tensor(5.0))
    got = {name: weight.tolist() for name, weight in folded.items()}
    assert got == {"W_enc": [[2.0]], "b_enc": [-5.0], "W_dec": [[30.0]], "b_dec": [47.0]}


@torch.no_grad()
@pytest.mark.parametrize(("d_in", "d_out"), [(16, 16), (16, 5), (5, 16)])
def test_folded_weights_do_for_raw_activations_what_the_others_do_for_normalised(d_in, d_out):
    generator = Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    sae = build(SAEConfig(features=40), d_in, d_out)
    for parameter in sae.parameters():
        parameter.copy_(noise(*parameter.shape))
    in_mean, out_mean = 5 * noise(d_in), 5 * noise(d_out)
    in_scale, out_scale = tensor(3.7), tensor(0.21)
    raw = noise(100, d_in) * in_scale + in_mean

    output = sae((raw - in_mean) / in_scale)
    expected = output.reconstruction * out_scale + out_mean
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    folded = build(SAEConfig(features=40), d_in, d_out)
    folded.load_state_dict(sae.fold(in_mean, in_scale, out_mean, out_scale))

    # Sums of up to 40 terms of size 10 to 100: float32 leaves about 1e-5 of that.
    assert_close(folded(raw).features, output.features, rtol=1e-5, atol=2e-5)
    assert_close(folded(raw).reconstruction, expected, rtol=1e-5, atol=5e-5)
    assert all(torch.equal(before[name], w) for name, w in sae.state_dict().items())


def test_an_unknown_architecture_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"model\.name=topkk: .* choose from relu, dense"):
        build(SAEConfig(name="topkk"), 4, 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"features": 0}, "model.features=0"),
        ({"features": -3}, "model.features=-3"),
        ({"decoder_norm": 0.0}, "model.decoder_norm=0.0"),
        ({"decoder_norm": float("nan")}, "model.decoder_norm=nan"),
    ],
)
def test_a_value_without_meaning_names_its_setting(setting, message):
    with pytest.raises(UserError) as error:
        SAEConfig(**setting)
    assert str(error.value).startswith(message)


def test_every_architecture_names_itself_as_saelens_does():
    assert {row.network.architecture for row in ARCHITECTURES.values()} == {"standard"}


def trained_loss(x: torch.Tensor, features: int) -> float:
    """Final loss of a dense autoencoder trained on all of x with Adam."""
    sae = build(SAEConfig(name="dense", features=features), x.shape[1], x.shape[1])
    steps = 1000
    adam = torch.optim.Adam(sae.parameters(), lr=2e-2)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1, 0.02, steps)
    for _ in range(steps):
        adam.zero_grad()
        loss = DenseLoss().terms(sae, sae(x), x)["mse"]
        loss.backward()
        adam.step()
        decay.step()
    return loss.item()


def test_a_dense_autoencoder_narrower_than_its_input_cannot_reach_zero_loss():
    # A reconstruction is b_dec plus a mix of the 4 rows of W_dec: whatever the encoder does, it
    # lies in a 4-dimensional plane. The best plane through isotropic data in 8 dimensions leaves
    # the 4 smallest eigenvalues of the covariance, half of the variance of 1 but for chance.
    x = torch.randn(512, 8, generator=Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))  # ascending
    floor = (eigenvalues[:4].sum() / 8).item()
    assert 0.4 < floor < 0.5
    # PCA reaches the floor with a linear encoder, which large biases make of a ReLU one.
    assert 0.9999 * floor < trained_loss(x, features=4) < 1.02 * floor


@pytest.mark.parametrize("features", [8, 12])
def test_a_dense_autoencoder_as_wide_as_its_input_reaches_zero_loss(features):
    # With all features active on all of the data both maps are linear and can be inverses.
    x = torch.randn(512, 8, generator=Generator().manual_seed(0))
    assert trained_loss(x, features) < 1e-4
