"""A feature's token set is found, and scored on text that it was not chosen on."""

import numpy as np
import pytest
import torch
from batches import batches

from sae_lightning.analysis.survey.sample import SequenceSampler
from sae_lightning.analysis.survey.token_sets import _correlate, score_token_sets

WORDS, SEQUENCES, CONTEXT = 50, 60, 41


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(
        2, WORDS, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(seed)
    )


def read(tokens: torch.Tensor, *fires: torch.Tensor):
    reducer = SequenceSampler(len(fires), 0)
    for batch in batches(torch.stack(fires, dim=2).float(), tokens):
        reducer.add(batch)
    return score_token_sets(reducer.result(), WORDS)


def listed(tokens: torch.Tensor) -> list[int]:
    return sorted(t for t in tokens.tolist() if t >= 0)


def test_a_feature_of_tokens_is_predicted_by_them():
    tokens = text()
    found = read(tokens, (tokens == 7) | (tokens == 9))
    assert found.score[0] == pytest.approx(1)
    assert listed(found.tokens[0]) == [7, 9]
    assert not found.previous[0]


def test_a_feature_of_the_token_before_is_told_from_one_of_the_token_itself():
    tokens = text()
    fires = torch.zeros_like(tokens, dtype=torch.bool)
    fires[:, 1:] = tokens[:, :-1] == 7
    found = read(tokens, fires)
    assert found.score[0] == pytest.approx(1)
    assert listed(found.tokens[0]) == [7]
    assert found.previous[0]


def test_a_feature_that_no_token_predicts_scores_about_0_though_it_fits_what_was_seen():
    """2,400 tokens, a tenth of them active: chance correlates by about 1 / sqrt(2,400) = 0.02."""
    tokens = text()
    random = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    found = read(tokens, random)
    assert abs(found.score[0]) < 0.08


def test_a_dense_feature_is_not_taken_for_a_predictable_one():
    """All tokens predict it in nine cases of ten, and yet say nothing."""
    tokens = text()
    dense = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.9
    assert abs(read(tokens, dense).score[0]) < 0.08


def test_a_set_that_holds_in_one_half_only_scores_badly():
    """In even sequences it fires on 7, in odd ones on 9: each half's set is wrong for the other."""
    tokens = text()
    even = (torch.arange(SEQUENCES) % 2 == 0)[:, None]
    found = read(tokens, torch.where(even, tokens == 7, tokens == 9))
    assert found.score[0] < 0.05


def test_a_set_that_predicts_nothing_is_empty():
    """Where all tokens are the same, they all are in the set or none is."""
    tokens = torch.full((SEQUENCES, CONTEXT), 3)
    random = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    found = read(tokens, random)
    assert found.score[0] == 0
    assert listed(found.tokens[0]) == []


def test_of_a_feature_that_hardly_fires_nothing_is_said():
    tokens = torch.full((SEQUENCES, CONTEXT), 3)
    tokens[:9, 5] = 7
    found = read(tokens, tokens == 7, tokens == 8)
    assert found.score.isnan().all()
    assert (found.tokens == -1).all()
    tokens[9, 5] = 7
    assert read(tokens, tokens == 7).score[0] == pytest.approx(1)


def correlation(said: np.ndarray, fires: np.ndarray) -> float:
    if said.std() == 0 or fires.std() == 0:
        return 0
    return np.corrcoef(said, fires)[0, 1]


def searched(tokens: np.ndarray, fires: np.ndarray) -> tuple[float, list[int]]:
    """The best head of the tokens by share of firing, by trying them all; both [n]."""
    occurs, fired = np.bincount(tokens), np.bincount(tokens, fires)
    ranked = sorted(np.flatnonzero(fired >= 2), key=lambda t: (-fired[t] / (occurs[t] + 1), t))
    tried = [(correlation(np.isin(tokens, ranked[:n]), fires), n) for n in range(len(ranked) + 1)]
    best, n = max(tried, key=lambda each: (round(each[0], 12), -each[1]))
    return best, ranked[:n]


def test_every_number_is_that_of_a_plain_search():
    """Features of many tokens, of the token before, and of none: with some probability each."""
    tokens, random = text(3), torch.Generator().manual_seed(4)
    before = tokens.roll(1, dims=1)
    chances = torch.rand(WORDS, 12, generator=random) ** 4
    chances[:, 8:] = 0.06
    odds = torch.cat([chances[tokens][..., :4], chances[before][..., 4:]], dim=2)
    fires = torch.rand(odds.shape, generator=random) < odds
    found = read(tokens, *fires.unbind(dim=2))
    half = (torch.arange(SEQUENCES) % 2)[:, None].expand(-1, CONTEXT - 1).flatten().numpy()
    for feature in range(12):
        y = fires[:, 1:, feature].flatten().numpy()
        known, held_out = [], []
        for column in (tokens, before):
            t = column[:, 1:].flatten().numpy()
            said = np.zeros(len(t), bool)
            for tested in (0, 1):
                members = searched(t[half != tested], y[half != tested])[1]
                said[half == tested] = np.isin(t[half == tested], members)
            held_out.append(correlation(said, y))
            known.append((*searched(t, y), np.bincount(t, y, minlength=WORDS)))
        chosen = int(known[1][0] > known[0][0])
        assert found.previous[feature] == bool(chosen)
        assert found.score[feature].item() == pytest.approx(held_out[chosen], abs=1e-6)
        _, members, counts = known[chosen]
        shown = [t for t in found.tokens[feature].tolist() if t >= 0]
        assert set(shown) <= set(members)
        assert counts[shown].tolist() == sorted(counts[members], reverse=True)[: len(shown)]


def test_the_correlation_of_a_worked_table():
    """8 tokens; the set holds 4, the feature fires on 4, both on 3: (3*8 - 4*4) / (4*4) = 0.5."""
    assert _correlate(np.array([3]), np.array([4]), np.array([4]), np.array(8)) == [0.5]
    # a set of nothing or of everything says nothing
    assert _correlate(
        np.array([0, 4]), np.array([0, 8]), np.array([4, 4]), np.array(8)
    ).tolist() == [
        0,
        0,
    ]
