"""Copies are gathered under the best ranked of them, and unlike features never are."""

import torch
from torch.nn.functional import normalize

from sae_lightning.analysis.survey.copies import find_originals
from sae_lightning.analysis.survey.related import find_neighbours
from sae_lightning.scoring.duplicates import COPY_COSINE


def on_a_circle(*degrees: float) -> torch.Tensor:
    """Decoder rows [n, 2] at these angles; a cosine of 0.9 is 25.8 degrees."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def grouped(rows: torch.Tensor, ranking: list[int], k: int = 5) -> list[int]:
    return find_originals(rows, find_neighbours(rows, k), torch.tensor(ranking)).tolist()


def test_a_copy_stands_under_the_best_ranked_of_its_kind():
    rows = on_a_circle(0, 5, 90, 10, 180)
    assert grouped(rows, [0, 1, 2, 3, 4]) == [0, 0, 2, 0, 4]
    assert grouped(rows, [3, 2, 4, 1, 0]) == [3, 3, 2, 3, 4]


def test_a_chain_of_features_that_are_like_the_next_is_no_group():
    rows = on_a_circle(*range(0, 181, 20))  # each like its neighbours only
    assert grouped(rows, list(range(10))) == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    # a feature that is like two belongs to the better one; what is left stands alone
    assert grouped(on_a_circle(0, 20, 40), [1, 0, 2]) == [1, 1, 1]
    assert grouped(on_a_circle(0, 20, 40), [0, 2, 1]) == [0, 0, 2]


def test_opposite_directions_are_no_copies_and_a_row_of_zeros_is_like_none():
    rows = torch.cat([on_a_circle(0, 180), torch.zeros(2, 2)])
    assert grouped(rows, [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_more_copies_than_nearest_neighbours_are_one_group():
    random = torch.Generator().manual_seed(0)
    clusters = normalize(torch.randn(5, 64, generator=random)).repeat_interleave(40, dim=0)
    rows = clusters + 0.02 * torch.randn(200, 64, generator=random)
    ranking = torch.randperm(200, generator=random).tolist()
    found = grouped(rows, ranking)
    for cluster in range(5):
        best = next(unit for unit in ranking if unit // 40 == cluster)
        assert found[40 * cluster : 40 * cluster + 40] == [best] * 40


def test_every_copy_is_like_its_original_and_no_two_originals_that_are_neighbours_are_alike():
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(500, 3, generator=random)
    ranking = torch.randperm(500, generator=random)
    original = torch.tensor(grouped(rows, ranking.tolist()))
    unit = normalize(rows)
    assert ((unit * unit[original]).sum(dim=1) > COPY_COSINE).all()
    assert torch.equal(original[original], original)
    place = ranking.argsort()
    assert (place[original] <= place).all()
    near = find_neighbours(rows)
    both = (original == torch.arange(500))[:, None] & (original[near.units] == near.units)
    assert not (both & (near.similarity > COPY_COSINE)).any()
