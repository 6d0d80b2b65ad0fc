"""What a survey says about all features together."""

import pytest
import torch

from sae_lightning.analysis.collect import collect, excerpt
from sae_lightning.analysis.survey.survey import best_read, section, survey


@pytest.fixture
def found(subject, words):
    return survey(subject, words(3000), tokens=1500, examples=4)


def test_its_numbers_are_those_of_its_catalogue(found):
    said, statistics = found.scalars(), found.features.statistics
    assert said["tokens"] == statistics.tokens >= 1500
    assert said["features"] == 32
    assert said["l0"] == pytest.approx(statistics.density.sum().item())
    assert said["unfired"] == (statistics.fired == 0).float().mean().item()
    assert sum(said["density"].values()) == 32
    known = found.features.reading.score[~found.features.reading.score.isnan()]
    assert said["scored"] == len(known) > 0
    assert said["score_median"] == known.median().item()
    rows = section(found).rows
    assert rows["text"] == f"{statistics.tokens:,} tokens"


def test_half_as_many_random_examples_as_strongest_ones_are_kept(found):
    assert found.features.top.strength.shape == (32, 4)
    assert found.features.spread.strength.shape == (32, 2)
    assert found.neurons.top.strength.shape == (24, 4)


def test_at_least_one_random_example_is_kept_and_it_is_not_the_strongest(subject, words):
    found = survey(subject, words(3000), tokens=1500, examples=1).features
    assert found.spread.strength.shape == (32, 1)
    several = found.statistics.fired > 20
    assert several.any()
    weaker = found.spread.strength < found.top.strength
    assert weaker[several].float().mean() > 0.5


def test_a_text_of_which_nothing_can_be_scored_is_told_without_scores(subject, words):
    found = survey(subject, words(3000), tokens=9)
    assert found.features.reading.score.isnan().all()
    assert found.scalars()["score_median"] is None
    assert "token score" not in section(found).rows
    assert best_read(found.features, 5) == []


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


def test_the_features_shown_first_are_the_best_predicted_ones_of_several_words(found):
    words = ["king", "queen", "duke", "king's", "King", "see", "saw", "seen", ",", "a"]
    sets = {
        0: [0, 1, 4],
        1: [0, 1, 2],
        2: [2, 1, 0, 5],
        3: [8, 9, 5, 6],
        4: [5, 6, 7],
        5: [6, 7, 3],
    }
    tokens = torch.full((32, 4), -1)
    for unit, ids in sets.items():
        tokens[unit, : len(ids)] = torch.tensor(ids)
    reading = found.features.reading._replace(
        score=torch.linspace(0.9, -0.1, 32), tokens=tokens.int()
    )
    catalogue = found.features._replace(reading=reading, vocabulary=words)
    # 0 has two words in three spellings, 2 those of 1, 3 but two of more than a letter
    assert best_read(catalogue, 5) == [1, 4]
    assert best_read(catalogue, 1) == [1]
