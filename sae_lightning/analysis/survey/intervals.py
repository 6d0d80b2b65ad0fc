"""Draws random examples from each interval of strengths, once each unit's maximum is known.

0                                      maximum         a unit's intervals, equally wide;
|-- 4 --|-- 3 --|-- 2 --|-- 1 --|-- 0 --|              interval 0 is the strongest
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.examples import make_empty_examples
from sae_lightning.analysis.survey.sample import Sample, rank_in_runs
from sae_lightning.report.catalogue import (
    AFTER,
    BEFORE,
    INTERVALS,
    LINEAR_BINS,
    WINDOW,
    Examples,
    find_interval,
    slice_units,
)

ENTRIES_AT_ONCE = 1 << 21  # entries of the sample to draw from at a time: bounds memory
WINDOWS_AT_ONCE = 1 << 16  # examples whose windows are read at a time: bounds memory


def estimate_histogram(sample: Sample, maximum: Tensor, tokens: int) -> Tensor:
    """Estimate on how many of `tokens` tokens each unit's strength is in each bin [units,
    LINEAR_BINS], int64; maximum: [units]. Exact if the sample is the whole text."""
    entry_units = sample.list_entry_units()
    share = sample.strengths / maximum[entry_units].clamp_min(torch.finfo(torch.float32).tiny)
    # a bin holds its upper edge, so that the maximum is in the last one
    bins = (share * LINEAR_BINS).ceil().clamp(1, LINEAR_BINS).long() - 1
    counts = torch.bincount(entry_units * LINEAR_BINS + bins, minlength=len(maximum) * LINEAR_BINS)
    scale = tokens / max(1, int(sample.keep.sum()))
    return (counts * scale).round().long().view(-1, LINEAR_BINS)


def draw_examples(
    sample: Sample, maximum: Tensor, top: Examples, per_interval: int, seed: int
) -> Examples:
    """Draw `per_interval` random examples from each interval of each unit, at most one per sequence
    and interval, and none that is in `top`; maximum: [units]."""
    starts = sample.starts
    cuts = torch.arange(0, len(sample.places), ENTRIES_AT_ONCE)
    # indices of the units at which parts of about ENTRIES_AT_ONCE entries begin
    bounds = {0, *torch.searchsorted(starts, cuts).tolist(), sample.unit_count}
    parts = []
    for first, end in pairwise(sorted(bounds)):
        entries = slice(starts[first], starts[end])
        part = sample._replace(
            starts=starts[first : end + 1] - starts[first],
            places=sample.places[entries],
            strengths=sample.strengths[entries],
        )
        units = slice(first, end)
        parts.append(_draw_part(part, maximum[units], slice_units(top, units), per_interval, seed))
    return Examples(*map(torch.cat, zip(*parts, strict=True)))  # field by field


def _draw_part(
    sample: Sample, maximum: Tensor, top: Examples, per_interval: int, seed: int
) -> Examples:
    """Do what `draw_examples` does, for all units of `sample` at once."""
    entries = _find_candidates(sample, top)
    unit, strength = sample.list_entry_units()[entries], sample.strengths[entries]
    interval = find_interval(strength, maximum[unit]).numpy()
    unit, place = unit.numpy(), sample.places.numpy()[entries]
    group = unit * INTERVALS + interval
    drawn = _draw_entries(sample, group, interval, place, per_interval, seed)
    drawn = drawn[np.lexsort((-strength.numpy()[drawn], unit[drawn]))]  # by unit, strongest first
    return _make_examples(
        sample, entries[drawn], rank_in_runs(unit[drawn]), INTERVALS * per_interval
    )


def _find_candidates(sample: Sample, top: Examples) -> np.ndarray:
    """Find the entries [n] of the sample that are not the peak of an example in `top`."""
    place_count, context = sample.tokens.numel(), sample.tokens.shape[1]
    # one number for each pair of a unit and a place; ascending
    keys = sample.list_entry_units().numpy() * place_count + sample.places.numpy()
    unit, slot = (top.peak_strength > 0).numpy().nonzero()
    sequence, position = top.sequence.numpy()[unit, slot], top.position.numpy()[unit, slot]
    sampled = sample.sequence_indices.numpy()
    # index of each sequence in the sample, if it was sampled
    index = np.searchsorted(sampled, sequence).clip(max=len(sampled) - 1)
    in_sample = sampled[index] == sequence
    peak_keys = (unit * place_count + index * context + position)[in_sample]
    is_candidate = np.ones(len(keys), bool)
    is_candidate[np.searchsorted(keys, peak_keys)] = False
    return is_candidate.nonzero()[0]


def _draw_entries(
    sample: Sample,
    group: np.ndarray,
    interval: np.ndarray,
    place: np.ndarray,
    per_interval: int,
    seed: int,
) -> np.ndarray:
    """Draw `per_interval` random entries of every group (an interval of a unit), at most one per
    sequence -> indices of entries. `group`, `interval` and `place`: [entries]."""
    sequences, context = sample.tokens.shape
    rng = np.random.default_rng(seed)
    # all units share the random keys, for speed; the order within each unit is still random
    sequence_keys = np.stack([rng.permutation(sequences) for _ in range(INTERVALS)])
    place_keys = rng.random((sequences, context)).argsort(axis=1).ravel()
    # one number for each pair of a group and a sequence
    pair = group * sequences + sequence_keys[interval, place // context]
    order = (pair * context + place_keys[place]).argsort()  # sequences and places in random order
    order = order[np.diff(pair[order], prepend=-1) > 0]  # first entry of each pair
    return order[rank_in_runs(group[order]) < per_interval]


def _make_examples(sample: Sample, entries: np.ndarray, slots: np.ndarray, n: int) -> Examples:
    """Make examples [units, n] of the sample's `entries`; `slots`: their indices in [0, n)."""
    context, units = sample.tokens.shape[1], sample.unit_count
    examples = make_empty_examples(units, n)
    entry_units, offsets = sample.list_entry_units(), torch.arange(-BEFORE, AFTER + 1)
    parts = zip(
        torch.from_numpy(entries).split(WINDOWS_AT_ONCE),
        torch.from_numpy(slots).split(WINDOWS_AT_ONCE),
        strict=True,
    )
    for entry, slot in parts:
        unit, place = entry_units[entry], sample.places[entry]
        sequence, position = place // context, place % context
        examples.peak_strength[unit, slot] = sample.strengths[entry]
        examples.sequence[unit, slot] = sample.sequence_indices[sequence]
        examples.position[unit, slot] = position.int()
        inside = ((position[:, None] + offsets) >= 0) & ((position[:, None] + offsets) < context)
        window = (place[:, None] + offsets).clamp(0, sample.tokens.numel() - 1)
        tokens = sample.tokens.flatten()[window]
        examples.tokens[unit, slot] = torch.where(inside, tokens, -1)
        examples.strengths[unit, slot] = _read_windows(sample, entry_units, entry).half()
    return examples


def _read_windows(sample: Sample, entry_units: Tensor, entry: Tensor) -> Tensor:
    """Read the strengths [m, WINDOW] of the entry's unit in the window around each `entry` [m].
    `entry_units`: the unit of each entry of the sample."""
    context, place = sample.tokens.shape[1], sample.places[entry, None]
    # a unit's entries are sorted by place: a window has at most BEFORE earlier, AFTER later ones
    near = (entry[:, None] + torch.arange(-BEFORE, AFTER + 1)).clamp(0, len(entry_units) - 1)
    offset = sample.places[near] - place + BEFORE  # index in the window
    inside = (entry_units[near] == entry_units[entry, None]) & (offset >= 0) & (offset < WINDOW)
    inside &= sample.places[near] // context == place // context  # in the same sequence
    row, _ = inside.nonzero(as_tuple=True)
    around = torch.zeros(len(entry), WINDOW)
    around[row, offset[inside]] = sample.strengths[near[inside]]
    return around.clamp(max=torch.finfo(torch.float16).max)
