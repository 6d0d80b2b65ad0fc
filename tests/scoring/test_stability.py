"""Matching of decoders on rows whose partners are known."""

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from sae_lightning.scoring import stability
from sae_lightning.scoring.stability import STABLE_COSINE, count_matches


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))


def test_a_permuted_copy_has_all_features_a_random_one_none_and_half_a_copy_half(monkeypatch):
    monkeypatch.setattr(stability, "BLOCK_ROWS", 7)  # several blocks, the last one smaller
    a, order = rows(100, 0), torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert count_matches(a, 3 * a[order]) == 100  # a row's norm has no meaning
    assert count_matches(a, rows(100, 1)) == 0
    assert count_matches(a, torch.cat([a[order[:50]], rows(50, 1)])) == 50
    assert count_matches(a, -a) == 0
    assert count_matches(a, a[:0]) == 0


def test_a_row_is_matched_once():
    a = rows(3, 0)
    assert count_matches(a, a[[0, 0, 0, 0]]) == count_matches(a[[0, 0, 0, 0]], a) == 1
    assert count_matches(a[[0, 0, 0]], a[[0, 0, 1]]) == 2


def test_pairs_are_matched_from_the_largest_cosine_down_and_end_at_the_threshold():
    angles = torch.tensor([0.0, 40.0, 46.0]).deg2rad()  # cos 46 = 0.695, cos 45 = 0.707
    zero, forty, more = torch.stack([angles.cos(), angles.sin()], dim=1).split(1)
    assert count_matches(zero, forty) == 1
    assert count_matches(zero, more) == 0
    # forty is nearest to more (6 degrees): zero, 40 degrees away, is left without a partner
    assert count_matches(torch.cat([zero, more]), forty) == 1


def test_it_finds_what_the_hungarian_algorithm_finds():
    a = rows(300, 0)
    b = a + 0.9 * rows(300, 1)  # cosines of about 0.74, with many below 0.7
    cosines = normalize(a) @ normalize(b).T
    i, j = linear_sum_assignment(cosines.numpy(), maximize=True)
    best = int((cosines[i, j] > STABLE_COSINE).sum())
    assert 150 < best < 290
    assert count_matches(a, b) == best
