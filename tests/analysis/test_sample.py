"""A part of the text of bounded size, exact in what it holds."""

import numpy as np
import pytest
import torch
from batches import batches, sparse

from sae_lightning.analysis.survey.sample import SequenceSampler

UNITS, CONTEXT = 5, 8


def sampled(features: torch.Tensor, seed: int = 0, **room: int):
    reducer = SequenceSampler(features.shape[2], seed, **room)
    for batch in batches(features):
        reducer.add(batch)
    return reducer.result()


def test_a_text_that_fits_is_kept_as_it_is():
    features = sparse(10, CONTEXT, UNITS)
    sample = sampled(features)
    assert sample.sequence_indices.tolist() == list(range(10))
    assert sample.tokens.flatten().tolist() == list(range(10 * CONTEXT))
    assert not sample.keep[:, 0].any()
    features[:, 0] = 0
    for feature in range(UNITS):
        assert torch.equal(sample.densify(feature), features[..., feature])
        mine = sample.places[sample.list_entry_units() == feature]
        assert torch.equal(mine, features[..., feature].flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("room", [{"tokens": 4 * CONTEXT}, {"entries": 45}])
def test_a_longer_text_leaves_whole_sequences_and_no_more_than_there_is_room_for(room):
    features = sparse(40, CONTEXT, UNITS)
    sample = sampled(features, **room)
    assert 1 <= len(sample.sequence_indices) < 40
    size = {"tokens": sample.tokens.numel(), "entries": len(sample.places)}
    assert all(size[name] <= most for name, most in room.items())
    features[:, 0] = 0
    for feature in range(UNITS):
        assert torch.equal(sample.densify(feature), features[sample.sequence_indices][..., feature])


def test_what_is_kept_has_drawn_the_highest_lots():
    """Also where sequences differ in how many features fire: no short one slips in below."""
    features = sparse(40, CONTEXT, UNITS)
    features[::3] = sparse(14, CONTEXT, UNITS, share=0.9, seed=1)
    lots = np.random.default_rng(7).random(40)
    kept = np.isin(np.arange(40), sampled(features, 7, entries=45).sequence_indices)
    assert lots[kept].min() > lots[~kept].max()


def test_a_text_in_which_nothing_fires_is_a_sample_too():
    sample = sampled(torch.zeros(3, CONTEXT, UNITS))
    assert (sample.unit_count, len(sample.places)) == (UNITS, 0)
    assert not sample.densify(2).any()


def test_every_sequence_is_as_likely_to_be_kept():
    features, kept = sparse(20, CONTEXT, UNITS), torch.zeros(20)
    for seed in range(300):
        kept[sampled(features, seed, tokens=5 * CONTEXT).sequence_indices] += 1
    # 5 of 20, 300 times: 75 each, with a standard deviation of 7.5
    assert kept.sum() == 1500
    assert (kept - 75).abs().max() < 4 * 7.5
