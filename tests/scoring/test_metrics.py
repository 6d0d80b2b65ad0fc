"""Metrics have closed-form answers, and do not depend on how the tokens are cut into batches."""

import math

import pytest
import torch
from torch import Generator, tensor

from sae_lightning.scoring.metrics import (
    FidelitySums,
    QualitySums,
    compute_explained_variance,
    count_by_density,
)


def quality(*batches):
    """The metrics of (target, reconstruction, features) batches."""
    sums = QualitySums()
    for batch in batches:
        sums.add(*batch)
    return sums.result()


def some(n: int, d: int = 6, features: int = 10, seed: int = 0):
    """Random tokens, a reconstruction that explains about 3/4 of them, and sparse features."""
    generator = Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    x_hat = x + 0.5 * torch.randn(n, d, generator=generator)
    f = torch.randn(n, features, generator=generator).sub(1).relu()
    return x, x_hat, f


def both(x, x_hat) -> tuple[float, float]:
    """Explained variance by the function and by the sums."""
    return (
        compute_explained_variance(x, x_hat).item(),
        quality((x, x_hat, torch.zeros(len(x), 1))).explained_variance,
    )


def test_predicting_the_mean_explains_nothing():
    x, _, _ = some(100)
    for ev in both(x, x.mean(dim=0).expand_as(x)):
        assert ev == pytest.approx(0, abs=1e-6)


def test_a_perfect_reconstruction_explains_everything():
    x, _, _ = some(100)
    assert both(x, x) == (1, 1)


def test_explained_variance_by_hand():
    # mean (1, 2); total: (1 + 4) + (1 + 4) = 10; residual: (0 + 1) + (1 + 0) = 2; 1 - 2/10
    x = tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = tensor([[0.0, 1.0], [1.0, 4.0]])
    assert both(x, x_hat) == pytest.approx((0.8, 0.8))


def test_worse_than_the_mean_is_negative():
    # total 2, residual 4 + 4
    x, x_hat = tensor([[-1.0], [1.0]]), tensor([[1.0], [-1.0]])
    assert both(x, x_hat) == (-3, -3)


def test_cutting_into_uneven_batches_changes_nothing():
    whole = some(100)
    parts = [tuple(t[a:b] for t in whole) for a, b in ((0, 1), (1, 40), (40, 97), (97, 100))]
    one, many = quality(whole), quality(*parts)
    assert many[:3] == pytest.approx(one[:3], rel=1e-12)
    assert torch.equal(many.density, one.density)
    assert one.explained_variance == pytest.approx(
        compute_explained_variance(*whole[:2]).item(), rel=1e-5
    )


def test_it_is_not_the_average_over_batches():
    # Two batches at 0 +- 1 and 10 +- 1, each reconstructed as its own mean: the average of the
    # batches' EVs is 0, but of the variance of all tokens, 1 + 5^2, only 1 is left.
    zeros = torch.zeros(2, 1)
    low = tensor([[-1.0], [1.0]])
    high = low + 10
    batches = [(low, zeros, zeros), (high, zeros + 10, zeros)]
    assert [quality(batch).explained_variance for batch in batches] == [0, 0]
    assert quality(*batches).explained_variance == pytest.approx(1 - 1 / 26)


def test_activations_far_from_the_origin_lose_no_digits():
    # The 1/64 grid is exact in float32 up to 2^18, so that the shift by 10 000 is exact too.
    x, x_hat, f = some(1000)
    x, x_hat = (64 * x).round() / 64, (64 * x_hat).round() / 64
    near = quality((x, x_hat, f))
    far_x, far_x_hat = x + 1e4, x_hat + 1e4
    assert torch.equal(far_x - 1e4, x)
    far = quality(*zip(far_x.split(90), far_x_hat.split(90), f.split(90), strict=True))
    # A sum of squares about the origin, 1e8 per element, would leave 1e-16 x 1e8 = 1e-8 of error.
    assert far.explained_variance == pytest.approx(near.explained_variance, rel=1e-11)


def test_half_precision_inputs_are_summed_exactly():
    x, x_hat, f = (t.bfloat16() for t in some(1000))
    assert quality((x, x_hat, f))[:3] == quality((x.double(), x_hat.double(), f.double()))[:3]


def test_constant_activations_have_no_explained_variance():
    x = torch.full((5, 2), 3.0)
    result = quality((x, x + 1, torch.ones(5, 1)))
    assert math.isnan(result.explained_variance)
    assert result.l0 == 1


def test_sparsity_by_hand():
    # features 1 to 4 fire on 2, 1, 0 and 3 of the 3 tokens: 6 firings
    f = tensor([[1.0, 0.0, 0.0, 5.0], [0.1, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 1.0]])
    result = quality((torch.randn(3, 2), torch.randn(3, 2), f))
    assert result.l0 == 2
    assert result.unfired == 0.25
    assert result.density.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 1])


def test_a_feature_that_fires_in_one_batch_only_has_fired():
    x = torch.randn(1, 2)
    result = quality((x, x, tensor([[1.0, 0.0, 0.0]])), (x, x, tensor([[0.0, 1.0, 0.0]])))
    assert result.unfired == pytest.approx(1 / 3)
    assert result.density.tolist() == [0.5, 0.5, 0]


def test_sums_keep_no_gradient():
    x = torch.randn(4, 2, requires_grad=True)
    sums = QualitySums()
    sums.add(x, 2 * x, x.relu())
    assert not sums.sum.requires_grad
    assert not sums.firing_counts.requires_grad


def fidelity(x, *batches):
    """The fidelity of (target, reconstruction) batches, about the mean of x."""
    sums = FidelitySums(x.double().mean(dim=0))
    for batch in batches:
        sums.add(*batch)
    return sums.result()


def test_fidelity_by_hand():
    # |x| = 5, 13; x_hat = (3, 0), (0, 12): |x_hat| = 3, 12; residual 16 + 25; x . x_hat 9 + 144
    x = tensor([[3.0, 4.0], [5.0, 12.0]])
    x_hat = tensor([[3.0, 0.0], [0.0, 12.0]])
    found = fidelity(x, (x, x_hat))
    assert found.mse == pytest.approx(41 / 4)
    assert found.relative_mse == pytest.approx(41 / (25 + 169))
    assert found.cosine == pytest.approx((3 / 5 + 12 / 13) / 2)
    assert found.norm_ratio == pytest.approx(15 / 18)
    assert found.gamma == pytest.approx(1)  # (9 + 144) / (9 + 144): no scaling of it is nearer
    # mean (4, 8): x - m = -+(1, 4); x_hat - m = (-1, -8), (-4, 4); products 33 and 12
    assert found.gamma_centred == pytest.approx((65 + 32) / (33 + 12))
    lengths = math.sqrt(17 * 65), math.sqrt(17 * 32)
    assert found.cosine_centred == pytest.approx((33 / lengths[0] + 12 / lengths[1]) / 2)


def test_a_reconstruction_that_is_too_short_by_a_fifth_is_found_so():
    x, _, _ = some(100)
    mean = x.mean(dim=0)
    short = fidelity(x, (x, 0.8 * x))
    assert (short.norm_ratio, short.gamma) == pytest.approx((0.8, 0.8))
    assert short.cosine == pytest.approx(1)
    about_mean = fidelity(x, (x, mean + 0.8 * (x - mean)))
    assert about_mean.gamma_centred == pytest.approx(0.8, rel=1e-5)
    assert about_mean.cosine_centred == pytest.approx(1)


def test_noise_around_the_best_guess_is_not_shrinkage():
    # x = s + n and x_hat = s, uncorrelated with n: |s|^2 / s . (s + n) -> 1, though s is shorter
    generator = Generator().manual_seed(0)
    s, n = torch.randn(2, 20_000, 8, generator=generator)
    found = fidelity(s + n, (s + n, s))
    assert found.gamma == pytest.approx(1, abs=0.01)
    assert found.norm_ratio == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_a_far_mean_flatters_the_cosine_about_the_origin_only():
    x, x_hat, _ = some(1000)
    near, far = fidelity(x, (x, x_hat)), fidelity(x + 100, (x + 100, x_hat + 100))
    assert near.cosine < 0.95 < 0.999 < far.cosine
    assert far.cosine_centred == pytest.approx(near.cosine_centred, rel=1e-4)


def test_fidelity_does_not_depend_on_the_cutting():
    x, x_hat, _ = some(100)
    parts = zip(x.split(33), x_hat.split(33), strict=True)
    assert fidelity(x, *parts) == pytest.approx(fidelity(x, (x, x_hat)), rel=1e-12)


def test_a_token_that_is_zero_has_no_direction_and_counts_nothing():
    x, x_hat = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[1.0, 0.0], [2.0, 0.0]])
    assert fidelity(x, (x, x_hat)).cosine == 0.5


def test_densities_are_counted_by_power_of_ten():
    density = torch.tensor([0, 0, 1e-3, 0.00999, 0.01, 0.5, 1.0, 2e-8])
    assert count_by_density(density) == {
        "never": 2,
        "1e-06": 1,
        "1e-05": 0,
        "1e-04": 0,
        "1e-03": 2,
        "1e-02": 1,
        "1e-01": 1,
        "1": 1,
    }
