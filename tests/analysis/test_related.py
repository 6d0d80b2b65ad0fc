"""Which features are like which."""

import pytest
import torch
from batches import batches, sparse

from sae_lightning.analysis.survey import related
from sae_lightning.analysis.survey.related import find_neighbours, find_partners
from sae_lightning.analysis.survey.sample import Sample, SequenceSampler


@pytest.fixture(params=[2, 512])
def slices(request, monkeypatch):
    monkeypatch.setattr(related, "BLOCK_FEATURES", request.param)


def test_neighbours_are_the_rows_of_the_largest_cosine(slices):
    rows = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 2.0], [-1.0, 0.0]])
    found = find_neighbours(rows, k=2)
    half = 0.5**0.5
    assert found.units.tolist()[0][0] == 1
    assert found.similarity[0].tolist() == pytest.approx([half, 0])
    assert sorted(found.units[1].tolist()) == [0, 2]
    assert found.similarity[1].tolist() == pytest.approx([half, half])
    assert found.similarity[3].tolist() == pytest.approx([0, -half], abs=1e-6)


def sample(features: torch.Tensor):
    reducer = SequenceSampler(features.shape[2], 0)
    for batch in batches(features):
        reducer.add(batch)
    return reducer.result()


def test_partners_fire_on_the_same_tokens(slices):
    """Tokens 1..6: feature 0 on 1 2 3 4, feature 1 on 3 4 5, feature 2 on 6, feature 3 never."""
    features = torch.zeros(1, 7, 4)
    for feature, places in enumerate(([1, 2, 3, 4], [3, 4, 5], [6], [])):
        features[0, places, feature] = 1
    found = find_partners(sample(features), k=2)
    assert found.units.tolist() == [[1, -1], [0, -1], [-1, -1], [-1, -1]]
    assert found.similarity[0].tolist() == pytest.approx([2 / 5, 0])  # 2 of 5 tokens are shared


def test_partners_of_a_dense_sae_are_told_from_its_first_tokens(monkeypatch):
    """Two features fire together on tokens 1 and 2, the first alone on 3, the second on 4 and 5."""
    features = torch.zeros(1, 6, 2)
    for feature, places in enumerate(([1, 2, 3], [1, 2, 4, 5])):
        features[0, places, feature] = 1
    assert find_partners(sample(features)).similarity[0].item() == pytest.approx(2 / 5)
    monkeypatch.setattr(related, "MAX_PAIRS", 4 + 4 + 1)  # of tokens 1, 2 and 3
    assert find_partners(sample(features)).similarity[0].item() == pytest.approx(2 / 3)


def test_a_single_feature_is_like_none():
    assert find_neighbours(torch.ones(1, 3)).units.shape == (1, 0)
    assert find_partners(sample(sparse(2, 6, 1))).units.shape == (1, 0)


def test_of_many_features_copies_are_found_and_few_pairs_are_looked_at(monkeypatch):
    """Copies at a cosine of 0.93, in an SAE whose rows all share a long direction as well."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 64, generator=random)
    rows[1::2] = rows[::2] + 0.4 * torch.randn(1500, 64, generator=random)
    rows[:, 0] += 5
    exact = find_neighbours(rows, k=1)
    monkeypatch.setattr(related, "MAX_EXACT_FEATURES", 1000)
    monkeypatch.setattr(related, "BLOCK_FEATURES", 128)
    looked_at = sum(len(mine) * len(others) for mine, others in related._pick_comparisons(rows))
    assert looked_at <= len(rows) * 128 * related.HASH_TABLES
    found = find_neighbours(rows, k=1)
    assert (found.units == exact.units).float().mean() > 0.995
    same = found.units == exact.units
    assert torch.allclose(found.similarity[same], exact.similarity[same], atol=1e-6)
    assert all(len({*row}) == 5 for row in find_neighbours(rows).units.tolist())


def test_partners_are_found_among_200_000_features_without_a_table_of_all_pairs():
    """Two features a token, and all others silent: 4e10 pairs, of which 1,000 fire together."""
    features, tokens = 200_000, 1000
    places = torch.arange(tokens).repeat_interleave(2)
    starts = torch.arange(features + 1).clamp(max=len(places))
    text = torch.zeros(10, tokens // 10, dtype=torch.int32)
    given = Sample(text, text == 0, torch.arange(10), starts, places, torch.ones(len(places)))
    found = find_partners(given)
    assert found.units[: len(places), 0].tolist() == (torch.arange(len(places)) ^ 1).tolist()
    assert found.similarity.sum() == len(places)
    assert (found.units[len(places) :] == -1).all()
