"""What is counted and kept of a text is what a look at all of it at once would find."""

from dataclasses import replace

import pytest
import torch
from batches import batches, sparse

from sae_lightning.analysis.survey import strengths
from sae_lightning.analysis.survey.examples import (
    FiringStatistics,
    StrongestExamples,
    TokenRecorder,
)
from sae_lightning.analysis.survey.strengths import Positive
from sae_lightning.report.catalogue import AFTER, BEFORE, EDGES, WINDOW

UNITS, CONTEXT = 7, 40


def gathered(features: torch.Tensor, n: int, size: int = 3):
    reducer = StrongestExamples(features.shape[2], n, strengths.read_feature_strengths)
    for batch in batches(features, size=size):
        reducer.add(batch)
    return reducer.result()


def test_counts_are_those_of_the_whole_text():
    features = sparse(11, CONTEXT, UNITS)
    reducer = FiringStatistics(UNITS, strengths.read_feature_strengths)
    for batch in batches(features):
        reducer.add(batch)
    found, read = reducer.result(), features[:, 1:].flatten(0, 1)
    assert found.tokens == 11 * (CONTEXT - 1)
    assert found.firing_counts.tolist() == (read > 0).sum(dim=0).tolist()
    torch.testing.assert_close(found.densities, (read > 0).float().mean(dim=0))
    torch.testing.assert_close(found.mean, read.sum(dim=0) / (read > 0).sum(dim=0))
    torch.testing.assert_close(found.maximum, read.amax(dim=0))
    for unit in range(UNITS):
        active = read[:, unit][read[:, unit] > 0]
        assert (
            found.histogram[unit].tolist()
            == torch.histogram(active.clamp(min=EDGES[0]), EDGES).hist.tolist()
        )


def test_strengths_beyond_the_histogram_are_in_its_last_bins():
    features = torch.zeros(1, 3, 1)
    features[0, 1:, 0] = torch.tensor([1e-9, 1e9])
    reducer = FiringStatistics(1, strengths.read_feature_strengths)
    for batch in batches(features):
        reducer.add(batch)
    histogram = reducer.result().histogram[0]
    assert (histogram[0], histogram[-1], histogram.sum()) == (1, 1, 2)


def test_a_unit_that_never_fires_has_a_mean_of_0_and_no_examples():
    features = sparse(4, CONTEXT, 2)
    features[..., 1] = 0
    reducer = FiringStatistics(2, strengths.read_feature_strengths)
    for batch in batches(features):
        reducer.add(batch)
    assert reducer.result().mean[1] == 0
    found = gathered(features, 3)
    assert found.peak_strength[1].tolist() == [0, 0, 0]
    assert (found.tokens[1] == -1).all()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_strongest_examples_are_those_of_the_whole_text_one_a_sequence(size):
    features = sparse(20, CONTEXT, UNITS, share=0.05)
    found = gathered(features, 4, size=size)
    read = features.clone()
    read[:, 0] = 0
    best, place = read.max(dim=1)  # [sequences, units]
    for unit in range(UNITS):
        strongest = best[:, unit].sort(descending=True)
        assert found.peak_strength[unit].tolist() == strongest.values[:4].tolist()
        for i in range(4):
            if strongest.values[i] == 0:
                continue
            sequence = int(strongest.indices[i])
            assert found.sequence[unit, i] == sequence
            assert found.position[unit, i] == place[sequence, unit]
            assert found.tokens[unit, i, BEFORE] == sequence * CONTEXT + place[sequence, unit]


def test_a_window_shows_the_text_around_its_peak_and_ends_with_the_sequence():
    features = torch.zeros(1, CONTEXT, 1)
    features[0, [3, 5], 0] = torch.tensor([1.0, 2.0])  # the peak is token 5
    found = gathered(features, 1)
    tokens = found.tokens[0, 0].tolist()
    outside = BEFORE - 5
    assert tokens == [-1] * outside + list(range(5 + AFTER + 1))
    strengths_there = found.strengths[0, 0].tolist()
    assert strengths_there[BEFORE] == 2
    assert strengths_there[BEFORE - 2] == 1
    assert sum(strengths_there) == 3
    assert len(tokens) == WINDOW


def test_a_window_ends_with_the_sequence_at_its_end_too():
    features = torch.zeros(2, CONTEXT, 1)
    features[0, CONTEXT - 3, 0] = 2  # two tokens are behind it, then the next sequence begins
    tokens = gathered(features, 1).tokens[0, 0].tolist()
    assert tokens[BEFORE:] == [CONTEXT - 3, CONTEXT - 2, CONTEXT - 1] + [-1] * (AFTER - 2)


def test_a_strength_that_is_too_great_for_its_window_is_the_greatest_there():
    features = torch.zeros(1, CONTEXT, 1)
    features[0, [4, 5], 0] = torch.tensor([7e4, 1e6])
    found = gathered(features, 1)
    assert found.peak_strength[0, 0] == 1e6
    assert found.strengths[0, 0, BEFORE - 1 : BEFORE + 1].tolist() == [65504, 65504]


def test_the_text_is_kept_as_it_was_read():
    texts, features = TokenRecorder(), sparse(5, CONTEXT, 1)
    for batch in batches(features, size=2):
        texts.add(batch)
    assert texts.result().ravel().tolist() == list(range(5 * CONTEXT))


def test_of_many_features_only_those_that_are_active_are_looked_at():
    """Ids that are far apart are counted and gathered as if there were no others between them."""
    few = sparse(6, CONTEXT, UNITS)
    many = torch.zeros(6, CONTEXT, 1000)
    many[..., 3::150] = few
    (batch,) = batches(many, size=6)
    assert batch.active_features[1].tolist() == [3 + 150 * i for i in range(UNITS)]
    for found, expected in zip(gathered(many, 4), gathered(few, 4), strict=True):
        assert torch.equal(found[3::150], expected)
    assert (
        gathered(many, 4).peak_strength.count_nonzero()
        == gathered(few, 4).peak_strength.count_nonzero()
    )


def test_neurons_are_made_positive_and_silent_where_no_sae_looks():
    (batch,) = batches(sparse(1, 4, 1), size=1)
    x = torch.tensor([[[9.0, 9.0], [-2.0, 1.0], [3.0, -1.0], [0.0, 0.5]]])
    batch = replace(batch, x=x)
    absolute = strengths.NeuronStrengthReader(Positive.abs)(batch)[0][0].tolist()
    assert absolute == [[0, 0], [2, 1], [3, 1], [0, 0.5]]
    assert strengths.NeuronStrengthReader(Positive.relu)(batch)[0][0].tolist() == [
        [0, 0],
        [0, 1],
        [3, 0],
        [0, 0.5],
    ]
    shift = strengths.NeuronStrengthReader(Positive.shift)  # less -2 and -1, the least values
    assert shift(batch)[0][0].tolist() == [[0, 0], [0, 2], [5, 0], [2, 1.5]]
    lower = replace(batch, x=x - 10)  # later values below the least are 0
    assert shift(lower)[0][0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0]]
