"""The catalogue that a parquet file holds; `parquet.write_table` writes it.

Shapes: units, n, k as in catalogue.py; entries = values of all lists, one after another.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from sae_lightning.report.catalogue import (
    AFTER,
    BEFORE,
    WINDOW,
    Catalogue,
    Effect,
    Examples,
    Reading,
    Related,
    Statistics,
)
from sae_lightning.report.parquet import NOTE


def read_note(path: Path) -> dict[str, Any]:
    """What the file says of itself: `of`, what it is a catalogue of, and `tokens`, how many were
    read. KeyError: it is of a version that noted nothing."""
    return json.loads(pyarrow.parquet.read_schema(path).metadata[NOTE])


def read_table(path: Path, vocabulary: list[str]) -> Catalogue:
    """The catalogue; a token gets an id in `vocabulary` that reads as it does, -1 if there is none.

    Lists [units, k] are as long as the longest of them.
    """
    columns = dict(_columns(pyarrow.parquet.read_table(path)))
    kind, ids = next(iter(columns)), {word: i for i, word in enumerate(vocabulary)}
    numbers = {name: _tensor(columns[name]) for name in ("fired", "mean", "maximum")}
    histogram = _padded(columns["histogram"], _tensor(columns["histogram"].flatten()), 0)
    examples = [_examples(columns[n], ids) for n in ("examples", "examples_of_all_strengths")]
    statistics = Statistics(read_note(path)["tokens"], **numbers, histogram=histogram)
    catalogue = Catalogue(kind, vocabulary, _text(*examples), statistics, *examples)
    if "score" in columns:
        previous = _tensor(columns["tokens_are_previous"])
        known = Reading(_tensor(columns["score"]), _tokens(columns["tokens"], ids), previous)
        catalogue = catalogue._replace(reading=known)
    if "telling" in columns:
        each = (_tensor(columns[name]) for name in ("telling", "copy_of"))
        catalogue = catalogue._replace(telling=next(each), copy_of=next(each))
    for name in ("neighbour", "partner"):
        if f"{name}s" in columns:
            units, likeness = columns[f"{name}s"], columns[f"{name}_likeness"]
            related = Related(
                _padded(units, _tensor(units.flatten()), -1),
                _padded(likeness, _tensor(likeness.flatten()), 0),
            )
            catalogue = catalogue._replace(**{f"{name}s": related})
    if "promoted" in columns:
        tokens = (_tokens(columns[name], ids).long() for name in ("promoted", "suppressed"))
        effect = Effect(*tokens, _tensor(columns["sharpness"]))
        catalogue = catalogue._replace(effect=effect)
    return catalogue


def _columns(table: pa.Table):
    for name in table.column_names:
        column = table[name].combine_chunks()
        yield name, column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _tensor(values: pa.Array) -> Tensor:
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())  # null becomes nan


def _counts(lists: pa.ListArray) -> Tensor:
    return _tensor(lists.value_lengths()).long()


def _padded(lists: pa.ListArray, values: Tensor, fill: float) -> Tensor:
    """The `values` [entries] of the lists in rows [units, k], with `fill` behind shorter ones."""
    counts = _counts(lists)
    k = max(1, int(counts.max()))
    rows = values.new_full((len(counts), k), fill)
    rows[torch.arange(k) < counts[:, None]] = values
    return rows


def _ids(words: pa.Array, ids: dict[str, int]) -> Tensor:
    """[entries] int32"""
    coded = words.dictionary_encode()
    known = np.array([ids.get(word, -1) for word in coded.dictionary.to_pylist()], np.int32)
    return torch.from_numpy(known[coded.indices.to_numpy()])


def _tokens(lists: pa.ListArray, ids: dict[str, int]) -> Tensor:
    """[units, k] int32, -1 where there are fewer"""
    return _padded(lists, _ids(lists.flatten(), ids), -1)


def _examples(lists: pa.ListArray, ids: dict[str, int]) -> Examples:
    each = lists.flatten()  # [examples] of all units
    words, strengths, peaks = each.field("tokens"), each.field("strengths"), each.field("peak")
    lengths = _counts(words)
    first = (BEFORE - _tensor(peaks).long()).repeat_interleave(lengths)
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    place = first + torch.arange(len(first)) - start  # in the window
    owner = torch.arange(len(each)).repeat_interleave(lengths)
    tokens = torch.full((len(each), WINDOW), -1, dtype=torch.int32)
    tokens[owner, place] = _ids(words.flatten(), ids)
    around = torch.zeros(len(each), WINDOW, dtype=torch.float16)
    around[owner, place] = _tensor(strengths.flatten()).half()
    row = torch.arange(len(each))
    slots = _padded(lists, row, -1)  # [units, n] the example, or none
    none = slots < 0
    return Examples(
        strength=_tensor(each.field("strength"))[slots].masked_fill(none, 0),
        tokens=tokens[slots].masked_fill(none[..., None], -1),
        strengths=around[slots].masked_fill(none[..., None], 0),
        sequence=_tensor(each.field("sequence"))[slots].masked_fill(none, 0),
        position=_tensor(each.field("position"))[slots].masked_fill(none, 0),
    )


def _text(*examples: Examples) -> np.ndarray:
    """[sequences, context] ids of the text, -1 where none of the examples shows it."""
    parts = [[], [], []]
    for each in examples:
        place = each.position[..., None] + torch.arange(-BEFORE, AFTER + 1)
        known = each.tokens >= 0
        sequence = each.sequence[..., None].expand_as(place)
        for part, values in zip(parts, (sequence, place, each.tokens), strict=True):
            part.append(values[known].numpy())
    sequence, place, tokens = map(np.concatenate, parts)
    text = np.full((sequence.max(initial=-1) + 1, place.max(initial=-1) + 1), -1, np.int32)
    text[sequence, place] = tokens
    return text
