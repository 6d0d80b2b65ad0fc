"""The examples of an interval are random ones of it, and of each interval there are some."""

import pytest
import torch
from batches import batches, sparse

from sae_lightning.analysis.survey import intervals, strengths
from sae_lightning.analysis.survey.examples import FiringStatistics, StrongestExamples
from sae_lightning.analysis.survey.intervals import draw_examples, estimate_histogram
from sae_lightning.analysis.survey.sample import SequenceSampler
from sae_lightning.report.catalogue import INTERVALS, LINEAR_BINS

UNITS, CONTEXT = 6, 40


def drawn(features, each=2, n=3, seed=0, **room):
    """Examples of the intervals, the strongest ones, and the sample that they are of."""
    units = features.shape[2]
    sampling = SequenceSampler(units, 0, **room)
    reducers = (
        FiringStatistics(units, strengths.read_feature_strengths),
        StrongestExamples(units, n, strengths.read_feature_strengths),
    )
    for batch in batches(features):
        for reducer in (*reducers, sampling):
            reducer.add(batch)
    statistics, top = (reducer.result() for reducer in reducers)
    sample = sampling.result()
    return draw_examples(sample, statistics.maximum, top, each, seed), top, sample


@pytest.mark.parametrize("room", [{}, {"tokens": 15 * CONTEXT}])
def test_an_example_is_what_stands_in_the_text_there(room):
    features = sparse(30, CONTEXT, UNITS)
    features[:, 0] = 0
    found, top, sample = drawn(features, **room)
    assert found.peak_strength.shape == (UNITS, 2 * INTERVALS)
    assert {*found.sequence[found.peak_strength > 0].tolist()} <= {
        *sample.sequence_indices.tolist()
    }
    whole = drawn(features, each=0, n=30)[1]  # all sequences' peaks, with windows
    for unit in range(UNITS):
        for slot in range(2 * INTERVALS):
            sequence, position = int(found.sequence[unit, slot]), int(found.position[unit, slot])
            assert found.peak_strength[unit, slot] == features[sequence, position, unit] > 0
            tokens, around = found.tokens[unit, slot], found.strengths[unit, slot]
            places = torch.arange(position - 20, position + 12)
            inside = (places >= 0) & (places < CONTEXT)
            assert torch.equal(tokens >= 0, inside)
            assert torch.equal(tokens[inside], (sequence * CONTEXT + places[inside]).int())
            wanted = features[sequence, places[inside], unit].half()
            assert torch.equal(around[inside], wanted)
            assert not around[~inside].any()
    assert (whole.peak_strength > 0).all()


def test_each_lies_in_its_interval_one_a_sequence_and_is_none_of_the_strongest():
    features = sparse(30, CONTEXT, UNITS, share=0.6)
    found, top, _ = drawn(features, each=4)
    maximum = top.peak_strength.amax(dim=1)
    for unit in range(UNITS):
        strongest = {*zip(top.sequence[unit].tolist(), top.position[unit].tolist(), strict=True)}
        assert found.peak_strength[unit].tolist() == sorted(
            found.peak_strength[unit].tolist(), reverse=True
        )
        for interval in range(INTERVALS):
            slots = slice(4 * interval, 4 * interval + 4)
            share = found.peak_strength[unit, slots] / maximum[unit]
            low = 1 - (interval + 1) / INTERVALS
            assert (share > low - 1e-6).all()
            assert (share <= low + 1 / INTERVALS + 1e-6).all()
            assert len(found.sequence[unit, slots].unique()) == 4
            places = zip(
                found.sequence[unit, slots].tolist(),
                found.position[unit, slots].tolist(),
                strict=True,
            )
            assert not strongest & {*places}


def test_how_many_entries_are_looked_at_at_a_time_changes_nothing(monkeypatch):
    features = sparse(30, CONTEXT, UNITS)
    features[..., 2] = 0
    whole = drawn(features)[0]
    for n in (1, 100, 700):
        monkeypatch.setattr(intervals, "ENTRIES_AT_ONCE", n)
        assert all(map(torch.equal, whole, drawn(features)[0]))


def test_an_interval_without_tokens_has_no_examples():
    features = torch.zeros(9, 5, 2)
    features[:, 2, 0] = torch.tensor([10.0, 9.9, 9.8, 0.5, 0.5, 0.5, 5, 5, 5])
    found, *_ = drawn(features, each=2, n=2)
    # 9.8 is the only one of its interval that is not among the strongest; unit 1 never fires
    assert found.peak_strength[0].tolist() == pytest.approx([9.8, 5, 5, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert not found.peak_strength[1].any()
    assert (found.tokens[1] == -1).all()


@pytest.mark.slow
def test_each_token_of_an_interval_is_as_likely_and_a_seed_draws_the_same_again():
    features = torch.zeros(31, 5, 1)
    features[:, 2, 0] = 5
    features[30, 2, 0] = 6  # the strongest
    chosen = torch.zeros(31)
    for seed in range(400):
        found, *_ = drawn(features, each=3, n=1, seed=seed)
        assert (found.peak_strength[0] > 0).tolist() == [True] * 3 + [False] * 12
        chosen[found.sequence[0, :3]] += 1
    assert chosen[30] == 0
    # 1,200 draws over 30 places: 40 each, with a standard deviation of 6
    assert chosen[:30].min() > 40 - 4 * 6
    assert chosen[:30].max() < 40 + 4 * 6
    again = [drawn(features, seed=seed)[0].sequence.tolist() for seed in (7, 7, 8)]
    assert again[0] == again[1] != again[2]


def test_bins_are_counted_exactly_and_estimated_where_the_sample_is_a_part():
    features = torch.zeros(1, CONTEXT, 2)
    # of a maximum of 5: bin 0 is (0, 0.1], bin 9 (0.9, 1.0], bin 49 (4.9, 5.0]
    features[0, 1:6, 0] = torch.tensor([0.05, 0.95, 1.0, 4.95, 5.0])
    _, _, sample = drawn(features)
    maximum, tokens = torch.tensor([5.0, 0.0]), int(sample.keep.sum())
    counts = estimate_histogram(sample, maximum, tokens)
    assert counts.shape == (2, LINEAR_BINS)
    assert {i: n for i, n in enumerate(counts[0].tolist()) if n} == {0: 1, 9: 2, 49: 2}
    assert not counts[1].any()
    assert torch.equal(estimate_histogram(sample, maximum, 3 * tokens), 3 * counts)
