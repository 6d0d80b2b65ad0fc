"""Detection of a few long tokens, or one dimension, that hold much of the variance."""

import math

import pytest
import torch
from torch import Generator, tensor

from sae_lightning.llm.sites import Kind, Site
from sae_lightning.sae import Output
from sae_lightning.scoring.dominance import find_dominant_dimension, find_dominant_tokens
from sae_lightning.scoring.scorecard import format_lines, score_saes
from sae_lightning.stream.rows import compute_medians, mark_usual_rows

SITE = Site(0, Kind.resid)
ROWS = [torch.ones(1, 1)]  # of a decoder, which does not matter here


def opposite(n: int) -> torch.Tensor:
    """n tokens of length 1 in opposite directions: mean 0, variance 1."""
    return tensor([1.0, -1.0]).repeat(n // 2)[:, None] * tensor([[1.0, 0.0]])


def test_the_longest_are_named_by_their_share_however_long_they_are():
    """12 of length r among 12,000 of length 1 hold 12 r^2 of the variance of 12,000 + 12 r^2."""
    assert find_dominant_tokens(torch.cat([opposite(12_000), 10 * opposite(12)])) is None  # 9 %
    for length, max_norm in ((11, 3), (30, 5)):  # between 1 and it: its root, in one digit
        dominant = find_dominant_tokens(torch.cat([opposite(12_000), length * opposite(12)]))
        share = 12 * length**2 / (12_000 + 12 * length**2)
        assert dominant[1:] == (pytest.approx(share, rel=1e-5), max_norm)
        assert dominant.token_count == 12


def test_tokens_nine_times_as_long_dominate_where_all_share_a_long_mean():
    """About a mean of length 1 the variance is 1/100: 5 of 8,128 at -9.7 hold nearly all of it."""
    x = 0.1 * torch.randn(8_128, 640, generator=Generator().manual_seed(0)) / math.sqrt(640)
    x[:, 7] += 1
    x[:5, 7] = -9.7
    dominant = find_dominant_tokens(x)
    assert dominant.token_count == 5
    # 5 (10.7)^2 = 572 of 572 + 8,128 / 100 = 654
    assert dominant.share == pytest.approx(572 / 654, abs=0.01)
    kept = mark_usual_rows({SITE: x}, compute_medians({SITE: x}), dominant.max_norm)
    assert torch.equal(kept, dominant.usual)
    assert (~kept).nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("copies", [13, 100])
def test_all_of_equal_length_are_named_together(copies):
    x = torch.cat([opposite(12_000), torch.full((copies, 2), 50.0)])
    assert find_dominant_tokens(x).token_count == copies


def test_one_long_token_in_each_short_sequence_is_told_too():
    """600 of length 50 hold 1.5 million of the variance, but 13 of them only 2 % of it."""
    dominant = find_dominant_tokens(torch.cat([opposite(12_000), 50 * opposite(600)]))
    assert dominant.token_count == 600
    assert dominant.share == pytest.approx(1.5e6 / (1.5e6 + 12_000), rel=1e-5)


def test_usual_activations_are_passed_over():
    g = Generator().manual_seed(0)
    for x in (torch.randn(200, 3, generator=g), torch.randn(5_000, 64, generator=g)):
        assert find_dominant_tokens(x) is None
    assert find_dominant_tokens(torch.zeros(10, 4)) is None
    mostly_zero = torch.cat([torch.zeros(900, 2), torch.ones(2, 2)])
    assert find_dominant_tokens(mostly_zero) is None  # no multiple of a median of 0
    for broken in (math.nan, math.inf):
        assert find_dominant_tokens(torch.full((10, 4), broken)) is None
        assert find_dominant_tokens(torch.cat([opposite(100), torch.full((1, 2), broken)])) is None


def test_a_dimension_that_dominates_is_named_with_what_is_explained_of_the_others():
    # 66 of 100 in dimension 1; of the other 34, 17 are left unexplained
    total = torch.cat([tensor([1.0, 66.0]), torch.full((99,), 1 / 3)]).double()
    residual = torch.cat([tensor([0.5, 0.0]), torch.full((99,), 1 / 6)]).double()
    assert find_dominant_dimension(residual, total) == (1, pytest.approx(0.66), pytest.approx(0.5))
    assert find_dominant_dimension(residual, torch.ones(101)) is None
    few = tensor([1.0, 0.0, 0.0])  # of three dimensions one may well hold it all
    assert find_dominant_dimension(few, few) is None


class Fixed:
    """A stub of HeldOut with given activations."""

    def __init__(self, x):
        self.x = x

    def activations(self, site):
        return self.x

    def measure_saes(self, source, target, saes, *_):
        return [None] * len(saes)


def test_the_scorecard_has_ev_of_usual_tokens_only_where_long_ones_dominate():
    """An SAE that knows the 12 long tokens and nothing else: EV 10,800 / 22,800, of the usual 0."""
    x = torch.cat([opposite(12_000), 30 * opposite(12)])
    known = (x.norm(dim=1, keepdim=True) > 2).float()

    def sae(part):
        assert len(part) <= 12_012
        kept = (part.norm(dim=1, keepdim=True) > 2).float()
        return Output(features=kept, reconstruction=part * kept)

    (card,) = score_saes([sae], ROWS, Fixed(x), SITE, SITE)
    scalars = card.scalars()
    assert scalars["explained_variance"] == pytest.approx(10_800 / 22_800, rel=1e-5)
    assert scalars["usual_explained_variance"] == pytest.approx(0, abs=1e-6)
    assert (scalars["usual_dropped"], scalars["usual_max_norm"]) == (12, 5)
    line = format_lines(scalars)["  of other tokens"]
    assert line == (
        "0.0000; the 12 of largest norm hold 47% of the variance (data.max_norm=5 leaves them out)"
    )
    (card,) = score_saes([sae], ROWS, Fixed(x[known.squeeze(1) == 0]), SITE, SITE)
    assert set(card.scalars()) == {
        *("l0", "explained_variance", "unfired", "duplicates", "nearest_cosine")
    }
    assert list(format_lines(card.scalars())) == ["L0", "explained variance", "unfired", "copies"]


def test_the_scorecard_names_a_dominant_dimension():
    x = torch.randn(500, 200, generator=Generator().manual_seed(0))
    x[:, 3] *= 20  # 400 of 599 on average

    def sae(part):
        others = torch.arange(200) != 3
        return Output(features=torch.ones(len(part), 1), reconstruction=part * ~others)

    (card,) = score_saes([sae], ROWS, Fixed(x), SITE, SITE)
    scalars = card.scalars()
    share = (x - x.mean(0)).square().sum(0) / (x - x.mean(0)).square().sum()
    assert scalars["dimension_index"] == 3
    assert scalars["dimension_share"] == pytest.approx(share[3].item(), rel=1e-5)
    assert scalars["dimension_explained_variance"] == pytest.approx(0, abs=0.01)
    assert "; dimension 3 holds 6" in format_lines(scalars)["  of other dimensions"]
