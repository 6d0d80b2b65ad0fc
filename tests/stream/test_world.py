"""The synthetic world: rates, causes and correlations against closed forms."""

import math

import pytest
import torch

from sae_lightning.stream.concepts import (
    GROUP_CONCEPTS,
    LOG_STRENGTH_STD,
    MAX_RATE,
    make_concept_world,
    make_zipf_rates,
)

SMALL = {"concepts": 64, "dim": 16, "l0": 4.0}
N = 40_000


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_zipf_rates_by_hand():
    # c (1 + 1/2 + 1/3 + 1/4) = 25/12 c = 1
    assert torch.allclose(make_zipf_rates(4, 1.0, 1.0), 0.48 / torch.tensor([1.0, 2, 3, 4]))
    # 1.5: c = 0.72 and 0.36 and ...: the first is held at 1/2, 13/12 c = 1 for the others
    expected = torch.tensor([0.5, 12 / 13 / 2, 12 / 13 / 3, 12 / 13 / 4])
    assert torch.allclose(make_zipf_rates(4, 1.5, 1.0), expected)
    assert torch.allclose(make_zipf_rates(4, 1.0, 0.0), torch.full((4,), 0.25))


@pytest.mark.parametrize("concepts", [1, 7, 1024])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.49, 0.5])
def test_rates_add_up_to_l0_and_none_is_above_a_half(concepts, exponent, share):
    rates = make_zipf_rates(concepts, share * concepts, exponent)
    assert rates.sum().item() == pytest.approx(share * concepts, rel=1e-5)
    assert rates.min() > 0 and rates.max() <= MAX_RATE
    assert (rates.diff() <= 1e-7).all()


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize("hierarchy", [0.0, 0.5])
def test_concepts_fire_at_their_rates_whatever_binds_them(correlation, hierarchy):
    world = make_concept_world(**SMALL, correlation=correlation, hierarchy=hierarchy)
    _, strengths = world.sample(N, generator())
    measured = (strengths > 0).float().mean(dim=0)
    deviation = (world.rates * (1 - world.rates) / N).sqrt()
    assert ((measured - world.rates).abs() < 4.5 * deviation).all()
    assert (strengths > 0).sum(dim=1).float().mean().item() == pytest.approx(4.0, abs=0.08)


def test_an_activation_is_the_sum_of_its_concepts():
    world = make_concept_world(**SMALL)
    x, strengths = world.sample(100, generator())
    by_hand = torch.stack(
        [sum((s * d for s, d in zip(row, world.directions, strict=True))) for row in strengths]
    )
    assert torch.allclose(x, by_hand, atol=1e-5)
    assert torch.allclose(world.directions.norm(dim=1), torch.ones(64))


def test_strengths_are_positive_and_vary_as_stated():
    strengths = make_concept_world(**SMALL).sample(N, generator())[1]
    logs = strengths[strengths > 0].log()
    assert strengths.min() == 0
    assert logs.mean().item() == pytest.approx(0, abs=0.01)
    assert logs.std().item() == pytest.approx(LOG_STRENGTH_STD, abs=0.01)


def test_concepts_of_a_group_fire_together_and_others_do_not():
    world = make_concept_world(**SMALL, correlation=0.6)
    assert world.group.bincount().tolist() == [GROUP_CONCEPTS] * 8
    active = (world.sample(N, generator())[1] > 0).float()
    measured = torch.corrcoef(active.T).fill_diagonal_(0)
    same = (world.group[:, None] == world.group) & ~torch.eye(64, dtype=torch.bool)
    other = world.group[:, None] != world.group
    assert measured[same].min() > 0.02
    assert measured[other].abs().max() < 4.5 / math.sqrt(N)


def test_a_copula_of_two_halves_has_the_known_orthant():
    # P(both) = 1/4 + arcsin(r) / 2 pi for two normals of correlation r below their medians
    world = make_concept_world(concepts=2, dim=2, l0=1.0, zipf=0.0, correlation=0.5)
    active = world.sample(N, generator())[1] > 0
    expected = 0.25 + math.asin(0.5) / (2 * math.pi)  # 1/3
    assert active.all(dim=1).float().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_a_child_never_fires_without_its_parent(correlation):
    world = make_concept_world(**SMALL, hierarchy=0.25, correlation=correlation)
    children = (world.parent != torch.arange(64)).nonzero().squeeze(1)
    assert children.tolist() == list(range(48, 64))  # the rarest
    assert world.parent[children].tolist() == list(range(16))
    active = world.sample(N, generator())[1] > 0
    assert active[:, children].any(dim=0).all()
    assert not (active[:, children] & ~active[:, world.parent[children]]).any()
    alone = active[:, world.parent[children]] & ~active[:, children]
    assert alone.any(dim=0).all(), "a parent also fires without its child"


def test_many_more_concepts_than_dimensions_are_nearly_orthogonal():
    directions = make_concept_world(concepts=1024, dim=256, l0=10.0).directions
    nearest = (directions @ directions.T).fill_diagonal_(0).abs().amax(dim=1)
    assert nearest.mean().item() == pytest.approx(0.21, abs=0.01)
    assert nearest.max() < 0.35


def test_seeds_fix_the_world_and_generators_its_samples():
    world, same = make_concept_world(**SMALL, seed=3), make_concept_world(**SMALL, seed=3)
    assert torch.equal(world.directions, same.directions)
    assert not torch.equal(world.directions, make_concept_world(**SMALL, seed=4).directions)
    x, strengths = world.sample(50, generator(7))
    assert torch.equal(x, same.sample(50, generator(7))[0])
    assert not torch.equal(x, same.sample(50, generator(8))[0])
    assert strengths.shape == (50, 64)
