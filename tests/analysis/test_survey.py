"""What a survey says about all features together."""

import pytest
import torch

from sae_lightning.analysis.collect import collect, excerpt
from sae_lightning.analysis.survey.survey import (
    make_features_section,
    pick_most_informative,
    rank_units,
    survey,
)
from sae_lightning.report.catalogue import BEFORE, INTERVALS


@pytest.fixture
def found(subject, words):
    return survey(subject, words(3000), tokens=1500, examples=4)


def test_its_numbers_are_those_of_its_catalogue(found):
    said, statistics = found.to_dict(), found.features.statistics
    assert said["tokens"] == statistics.tokens >= 1500
    assert said["features"] == 32
    assert said["l0"] == pytest.approx(statistics.densities.sum().item())
    assert said["unfired"] == (statistics.firing_counts == 0).float().mean().item()
    assert sum(said["density"].values()) == 32
    known = found.features.token_sets.score[~found.features.token_sets.score.isnan()]
    assert said["scored"] == len(known) > 0
    assert said["score_median"] == known.median().item()
    rows = make_features_section(found).numbers
    assert rows["text"] == f"{statistics.tokens:,} tokens"


def test_of_every_interval_a_sixth_as_many_examples_as_strongest_ones_are_kept(subject, words):
    found = survey(subject, words(3000), tokens=1500, examples=12)
    for catalogue in (found.features, found.neurons):
        assert catalogue.top.peak_strength.shape == (catalogue.num_units, 12)
        assert catalogue.random.peak_strength.shape == (catalogue.num_units, 2 * INTERVALS)
        several = catalogue.statistics.firing_counts > 200
        assert several.any()
        assert (catalogue.random.peak_strength[several] > 0).float().mean() > 0.8
        examples = catalogue.random
        there = examples.peak_strength > 0
        read = catalogue.token_ids[examples.sequence[there], examples.position[there]]
        assert read.tolist() == examples.tokens[..., BEFORE][there].tolist()


def test_at_least_one_example_of_an_interval_is_kept(found):
    assert found.features.top.peak_strength.shape == (32, 4)
    assert found.features.random.peak_strength.shape == (32, INTERVALS)


def test_a_text_of_which_nothing_can_be_scored_is_told_without_scores(subject, words):
    found = survey(subject, words(3000), tokens=9)
    assert found.features.token_sets.score.isnan().all()
    assert found.to_dict()["score_median"] is None
    assert "token score" not in make_features_section(found).numbers
    assert pick_most_informative(found.features, 5) == []


def test_reducers_that_read_along_see_the_same_pass(subject, words):
    class Tokens:
        def __init__(self):
            self.seen = []

        def add(self, batch):
            self.seen += batch.tokens.tolist()

    beside, alone = Tokens(), Tokens()
    survey(subject, words(3000), tokens=500, reducers=[beside])
    text, total = excerpt(words(3000), 500, 16)
    collect(subject, text, [alone], total=total)
    assert beside.seen == alone.seen


def test_the_features_shown_first_are_the_most_informative_ones_that_are_no_copies(found):
    nan, informativeness = float("nan"), torch.linspace(0.9, 0.1, 32)
    informativeness[:4] = torch.tensor([nan, 0.2, 0.95, 0])
    copy_of = torch.arange(32)
    copy_of[[4, 6]] = 2
    catalogue = found.features._replace(informativeness=informativeness, copy_of=copy_of)
    assert pick_most_informative(catalogue, 3) == [2, 5, 7]
    assert found._replace(features=catalogue).best == 2
    assert len(pick_most_informative(catalogue, 99)) == 32 - 2 - 2  # without a score, or of 0


def test_copies_stand_under_the_most_informative_of_them(subject, words):
    subject.sae.W_dec[[3, 5, 9]] = subject.sae.W_dec[7] * torch.tensor([[1.0], [2.0], [0.5]])
    features = survey(subject, words(3000), tokens=1500, examples=1).features
    best = next(unit for unit in rank_units(features).tolist() if unit in (3, 5, 7, 9))
    assert features.copy_of[[3, 5, 7, 9]].tolist() == [best] * 4
    assert (features.copy_of != torch.arange(32)).sum() == 3
