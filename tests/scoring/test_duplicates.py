"""Copies are counted among the features that fire, against every decoder row."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Generator, tensor
from torch.nn.functional import normalize

from sae_lightning.files import make_jsonable
from sae_lightning.scoring import duplicates
from sae_lightning.scoring.duplicates import find_nearest_cosines, measure_copies

EYE = torch.eye(8)
NONE = pytest.approx((math.nan, math.nan), nan_ok=True)


def at(cosine: float) -> torch.Tensor:
    """A row [1, 8] at this cosine with the first dimension, in the plane of the last."""
    return cosine * EYE[:1] + math.sqrt(1 - cosine**2) * EYE[7:]


def fires(*live: int, of: int) -> torch.Tensor:
    return torch.zeros(of).index_fill(0, tensor(live, dtype=torch.int64), 0.1)


@pytest.mark.parametrize(
    ("rows", "live", "expected"),
    [
        (EYE, range(8), (0, 0)),  # all perpendicular
        (-EYE[:1].expand(3, 8) * tensor([[1], [2], [-3]]), range(3), (2 / 3, 1)),  # not opposites
        (torch.cat([EYE[:4], 9 * EYE[:3]]), range(7), (6 / 7, 1)),  # whatever the norm
        (torch.cat([EYE[:3], at(0.91)]), range(4), (0.5, 0)),
        (torch.cat([EYE[:3], at(0.89)]), range(4), (0, 0)),
        (torch.cat([EYE[:1], at(0.6)]), range(2), (0, 0.6)),
        (torch.cat([EYE[:3], EYE[:1]]), [0, 1], (0.5, 0)),  # a copy that is dead is a copy
        (torch.cat([EYE[:3], EYE[:1], EYE[:1]]), [1, 2], (0, 0)),  # what is dead does not count
        (torch.cat([EYE, at(0.8)]), [0], (0, 0.8)),  # one that is live
        (torch.cat([EYE[:1], 0 * EYE[:1]]), range(2), (0, 0)),  # a row of zeros is like none
        (EYE[:1], [0], (0, -1)),  # one feature alone
        (EYE, [], NONE),
    ],
)
def test_copies_by_hand(rows, live, expected):
    assert measure_copies(rows, fires(*live, of=len(rows))) == pytest.approx(expected, nan_ok=True)


def test_a_row_that_is_not_finite_is_told_and_no_feature_at_all_is_null_in_json():
    assert math.isnan(measure_copies(torch.full((3, 2), math.nan), torch.ones(3)).nearest_cosine)
    none = json.loads(json.dumps(make_jsonable(measure_copies(EYE, torch.zeros(8)))))
    assert none == {"duplicates": None, "nearest_cosine": None}


@pytest.mark.parametrize("live", [1, 40, 99, 100])
def test_blocks_change_nothing(live, monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 16)
    generator = Generator().manual_seed(0)
    W_dec = torch.randn(100, 5, generator=generator)
    which = torch.randperm(100, generator=generator)[:live]
    table = (normalize(W_dec) @ normalize(W_dec).T).fill_diagonal_(-1)
    expected = table.amax(dim=1)[which]
    assert torch.allclose(find_nearest_cosines(W_dec, which), expected, rtol=0, atol=1e-6)


def test_of_more_live_features_than_can_be_compared_some_stand_for_all(monkeypatch):
    """Every fourth of 4,000 has a copy that is dead: a quarter of the 1,000 that are compared."""
    monkeypatch.setattr(duplicates, "MAX_FIRING_FEATURES", 1_000)
    compared = []

    def nearest(W_dec, which):
        compared.append(which)
        return (which % 4 == 0).float()

    monkeypatch.setattr(duplicates, "find_nearest_cosines", nearest)
    density = fires(*range(4_000), of=5_000)
    assert measure_copies(torch.zeros(5_000, 1), density).duplicates == pytest.approx(
        0.25, abs=0.03
    )
    measure_copies(torch.zeros(5_000, 1), density)
    assert len(compared[0].unique()) == 1_000
    assert torch.equal(*compared)


@pytest.mark.gpu
def test_a_gpu_counts_the_same():
    W_dec = torch.randn(3_000, 6, generator=Generator().manual_seed(0))
    density = fires(*range(0, 3_000, 2), of=3_000)
    assert measure_copies(W_dec.cuda(), density) == pytest.approx(
        measure_copies(W_dec, density), abs=2e-3
    )


def test_the_referee_of_the_benchmark_counts_the_same(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from peers import evaluator

    W_dec = torch.randn(300, 4, generator=Generator().manual_seed(0))
    density = fires(*range(0, 300, 3), of=300)
    assert 0 < measure_copies(W_dec, density).duplicates < 1
    assert evaluator.measure_copies(W_dec, density > 0) == pytest.approx(
        measure_copies(W_dec, density)._asdict()
    )
