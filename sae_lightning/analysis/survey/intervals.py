"""Random examples of every interval of strengths, drawn from the sample once the maxima are known.

0                                         maximum      interval i of a unit:
|---- 4 ---|-- 3 --|-- 2 --|-- 1 --|-- 0 --|           the uppermost is 0
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import (
    AFTER,
    BEFORE,
    INTERVALS,
    WINDOW,
    Examples,
    find_interval,
    slice_units,
)

ENTRIES_AT_ONCE = 1 << 21  # entries of the sample among which is drawn at a time: bounds memory
WINDOWS_AT_ONCE = 1 << 16  # examples whose windows are looked up at a time


def draw_examples(sample: Sample, maximum: Tensor, top: Examples, each: int, seed: int) -> Examples:
    """`each` examples of every interval of each unit, at most one a sequence, and none of `top`.

    maximum: [units].
    """
    starts = sample.starts
    some = torch.tensor(
        range(ENTRIES_AT_ONCE, len(sample.places), ENTRIES_AT_ONCE), dtype=torch.int64
    )
    inner = torch.searchsorted(starts, some)
    parts = []
    for first, end in pairwise(sorted({0, *inner.tolist(), sample.unit_count})):
        entries = slice(starts[first], starts[end])
        part = sample._replace(
            starts=starts[first : end + 1] - starts[first],
            places=sample.places[entries],
            strengths=sample.strengths[entries],
        )
        units = slice(first, end)
        parts.append(_draw_part(part, maximum[units], slice_units(top, units), each, seed))
    return Examples(*map(torch.cat, zip(*parts, strict=True)))


def _draw_part(sample: Sample, maximum: Tensor, top: Examples, each: int, seed: int) -> Examples:
    entries = _find_candidates(sample, top)
    unit, strength = sample.owners()[entries], sample.strengths[entries]
    interval = find_interval(strength, maximum[unit]).numpy()
    unit, place = unit.numpy(), sample.places.numpy()[entries]
    drawn = _draw_entries(sample, unit * INTERVALS + interval, interval, place, each, seed)
    drawn = drawn[np.lexsort((-strength.numpy()[drawn], unit[drawn]))]
    return _make_examples(sample, entries[drawn], _rank_in_group(unit[drawn]), INTERVALS * each)


def _find_candidates(sample: Sample, top: Examples) -> np.ndarray:
    """Numbers of the sample's entries that are not the peak of an example of `top`."""
    size, context = sample.tokens.numel(), sample.tokens.shape[1]
    keys = sample.owners().numpy() * size + sample.places.numpy()  # ascending
    unit, i = (top.strength > 0).numpy().nonzero()
    sequence, position = top.sequence.numpy()[unit, i], top.position.numpy()[unit, i]
    ids = sample.ids.numpy()
    row = np.searchsorted(ids, sequence).clip(max=len(ids) - 1)
    held = ids[row] == sequence
    others = np.ones(len(keys), bool)
    others[np.searchsorted(keys, (unit * size + row * context + position)[held])] = False
    return others.nonzero()[0]


def _draw_entries(
    sample: Sample,
    group: np.ndarray,
    interval: np.ndarray,
    place: np.ndarray,
    each: int,
    seed: int,
) -> np.ndarray:
    """Which `each` of every group are drawn, one a sequence: one sort, by group and then by lot."""
    sequences, context = sample.tokens.shape
    rng = np.random.default_rng(seed)
    # one lot for all units: for each of them its order is as random
    of_sequence = np.stack([rng.permutation(sequences) for _ in range(INTERVALS)])
    of_place = rng.random((sequences, context)).argsort(axis=1).ravel()
    line = group * sequences + of_sequence[interval, place // context]
    order = (line * context + of_place[place]).argsort()
    order = order[np.diff(line[order], prepend=-1) > 0]  # the first of each sequence
    return order[_rank_in_group(group[order]) < each]


def _rank_in_group(group: np.ndarray) -> np.ndarray:
    """The place [n] of each member in its group, whose members lie side by side."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))


def _make_examples(sample: Sample, entries: np.ndarray, slot: np.ndarray, n: int) -> Examples:
    """The sample's `entries` as examples, each in its slot of the n of its unit."""
    context, units = sample.tokens.shape[1], sample.unit_count
    found = Examples(
        strength=torch.zeros(units, n),
        tokens=torch.full((units, n, WINDOW), -1, dtype=torch.int32),
        strengths=torch.zeros(units, n, WINDOW, dtype=torch.float16),
        sequence=torch.zeros(units, n, dtype=torch.int64),
        position=torch.zeros(units, n, dtype=torch.int32),
    )
    owners, offsets = sample.owners(), torch.arange(-BEFORE, AFTER + 1)
    parts = zip(
        torch.from_numpy(entries).split(WINDOWS_AT_ONCE),
        torch.from_numpy(slot).split(WINDOWS_AT_ONCE),
        strict=True,
    )
    for entry, mine in parts:
        unit, place = owners[entry], sample.places[entry]
        sequence, position = place // context, place % context
        found.strength[unit, mine] = sample.strengths[entry]
        found.sequence[unit, mine] = sample.ids[sequence]
        found.position[unit, mine] = position.int()
        inside = ((position[:, None] + offsets) >= 0) & ((position[:, None] + offsets) < context)
        window = (place[:, None] + offsets).clamp(0, sample.tokens.numel() - 1)
        tokens = sample.tokens.flatten()[window]
        found.tokens[unit, mine] = torch.where(inside, tokens, -1)
        found.strengths[unit, mine] = _read_windows(sample, owners, entry).half()
    return found


def _read_windows(sample: Sample, owners: Tensor, entry: Tensor) -> Tensor:
    """Strengths [m, WINDOW] of its unit around each entry [m]."""
    context, place = sample.tokens.shape[1], sample.places[entry, None]
    # a place is one entry of a unit, so that these are among as many neighbours
    near = entry[:, None] + torch.arange(-BEFORE, AFTER + 1)
    near = near.clamp(0, len(owners) - 1)
    offset = sample.places[near] - place + BEFORE
    same = (owners[near] == owners[entry, None]) & (offset >= 0) & (offset < WINDOW)
    same &= sample.places[near] // context == place // context
    row, column = same.nonzero(as_tuple=True)
    around = torch.zeros(len(entry), WINDOW)
    around[row, offset[same]] = sample.strengths[near[row, column]]
    return around.clamp(max=torch.finfo(torch.float16).max)
