"""Reads the catalogues that `parquet.write_catalogue` writes.

Shapes: n = examples of a unit; k = length of the longest list of a column; entries = values of all
lists of a column, concatenated.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor
from torch.nn.functional import pad

from sae_lightning.report.catalogue import (
    AFTER,
    BEFORE,
    EDGES,
    LINEAR_BINS,
    WINDOW,
    Catalogue,
    Examples,
    LogitEffect,
    RelatedUnits,
    Statistics,
    TokenSetScores,
)
from sae_lightning.report.parquet import METADATA_KEY

# Limits on the memory that an untrusted file can take, as all lists of a column are padded to the
# longest.
MAX_LIST_LENGTH = 1024
MAX_TEXT_TOKENS = 1 << 27  # sequences * context
MAX_COUNT = 2**32 - 1  # the page stores uint32


class CatalogueHeader(NamedTuple):
    """What the footer of a file says, read without its columns."""

    kind: str
    """What a unit is: 'feature' or 'neuron', unless the file is damaged."""
    units: int
    origin: dict[str, str]
    """The `origin` that `write_catalogue` was given."""
    tokens: int
    """Number of tokens that the catalogue is over."""


def read_header(path: Path) -> CatalogueHeader:
    """Read the footer of a catalogue. A KeyError means that an older version wrote the file, any
    other exception that it is damaged."""
    footer = pyarrow.parquet.read_metadata(path)
    metadata = json.loads(footer.metadata[METADATA_KEY])
    kind = footer.schema.to_arrow_schema().names[0]
    return CatalogueHeader(kind, footer.num_rows, dict(metadata["of"]), metadata["tokens"])


def read_catalogue(path: Path, vocabulary: list[str]) -> Catalogue:
    """Read a catalogue. The text of a token becomes its id in `vocabulary`, or -1 if it has none.

    Lists are padded to the longest, [units, k]. Any exception means that the file is damaged.
    """
    table = pyarrow.parquet.read_table(path)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    kind = next(iter(columns))  # the first column numbers the units and is named after their kind
    ids = {word: i for i, word in enumerate(vocabulary)}
    last_unit, tokens = len(columns[kind]) - 1, read_header(path).tokens
    numbers = {"firing_counts": _read_integers(columns["fired"], MAX_COUNT)}
    numbers |= {name: _read_reals(columns[name]) for name in ("mean", "maximum")}
    histogram = _read_counts(columns["histogram"], len(EDGES) - 1)
    if not 1 <= tokens <= 2**53:  # JavaScript's integers are exact up to this
        raise ValueError(f"{tokens} tokens")
    statistics = Statistics(tokens, **numbers, histogram=histogram)
    top = _read_examples(columns["examples"], ids)
    random = _read_examples(columns["examples_of_all_strengths"], ids)
    catalogue = Catalogue(kind, vocabulary, _rebuild_text(top, random), statistics, top, random)
    if "score" in columns:
        previous = _to_tensor(columns["tokens_are_previous"]).bool()
        token_sets = TokenSetScores(
            _to_tensor(columns["score"]).float(), _read_tokens(columns["tokens"], ids), previous
        )
        catalogue = catalogue._replace(token_sets=token_sets)
    if "telling" in columns:  # the file's name of informativeness
        informativeness = _to_tensor(columns["telling"]).float()
        copy_of = _read_integers(columns["copy_of"], last_unit)
        catalogue = catalogue._replace(informativeness=informativeness, copy_of=copy_of)
    for name in ("neighbour", "partner"):
        if f"{name}s" in columns:
            units, similarity = columns[f"{name}s"], columns[f"{name}_likeness"]
            related = RelatedUnits(
                _pad_lists(units, _read_integers(units.flatten(), last_unit), -1),
                _read_real_lists(similarity),
            )
            if related.units.shape != related.similarity.shape:
                raise ValueError(f"{name}s and {name}_likeness differ in number")
            catalogue = catalogue._replace(**{f"{name}s": related})
    if "promoted" in columns:
        catalogue = catalogue._replace(effect=_read_effect(columns, ids))
    if "linear_histogram" in columns:
        bins = _read_counts(columns["linear_histogram"], LINEAR_BINS)
        catalogue = catalogue._replace(linear_histogram=bins)
    return catalogue


def _read_effect(columns: dict[str, pa.Array], ids: dict[str, int]) -> LogitEffect:
    """Read the effect on logits; in files of older versions, only tokens and their sharpness."""
    tokens = (_read_tokens(columns[name], ids).long() for name in ("promoted", "suppressed"))
    effect = LogitEffect(*tokens, _to_tensor(columns["sharpness"]).float())
    if "effect_histogram" not in columns:
        return effect
    return effect._replace(
        raised=_read_real_lists(columns["effect_raised"]),
        lowered=_read_real_lists(columns["effect_lowered"]),
        histogram=_read_counts(columns["effect_histogram"], LINEAR_BINS),
    )


def _to_tensor(values: pa.Array) -> Tensor:
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())  # null becomes NaN


def _read_integers(values: pa.Array, maximum: int) -> Tensor:
    """Convert `values` to int64; ValueError unless all are from 0 to `maximum`."""
    numbers = _to_tensor(values)
    if not ((numbers >= 0) & (numbers <= maximum)).all():
        raise ValueError(f"a number is not from 0 to {maximum:,}")
    return numbers.long()


def _read_counts(lists: pa.ListArray, bins: int) -> Tensor:
    """Convert histograms to int64 [units, bins], padded with 0. ValueError if the longest has
    another number of bins, or a count is not from 0 to MAX_COUNT."""
    counts = _pad_lists(lists, _read_integers(lists.flatten(), MAX_COUNT), 0)
    if counts.shape[1] != bins:
        raise ValueError(f"{counts.shape[1]} bins")
    return counts


def _read_reals(values: pa.Array) -> Tensor:
    """Convert `values` to float32; ValueError unless all are finite."""
    numbers = _to_tensor(values).float()
    if not numbers.isfinite().all():
        raise ValueError("a number is not finite")
    return numbers


def _count_entries(lists: pa.ListArray) -> Tensor:
    """Number of values in each list, int64."""
    return _to_tensor(lists.value_lengths()).long()


def _read_real_lists(lists: pa.ListArray) -> Tensor:
    """Convert lists to float32 [units, k], padded with 0; ValueError unless all are finite."""
    return _pad_lists(lists, _read_reals(lists.flatten()), 0)


def _pad_lists(lists: pa.ListArray, values: Tensor, fill: float) -> Tensor:
    """Arrange the `values` [entries] of `lists` in rows [units, k], padded with `fill`.
    ValueError if a list is longer than MAX_LIST_LENGTH."""
    counts = _count_entries(lists)
    k = max(1, int(counts.max()))  # 1 if all lists are empty
    if k > MAX_LIST_LENGTH:
        raise ValueError(f"a list of {k:,} values")
    rows = values.new_full((len(counts), k), fill)
    rows[torch.arange(k) < counts[:, None]] = values
    return rows


def _look_up_ids(texts: pa.Array, ids: dict[str, int]) -> Tensor:
    """Look up the token ids [entries] of texts, int32; -1 for a text without an id."""
    encoded = texts.dictionary_encode()
    codes = np.array([ids.get(text, -1) for text in encoded.dictionary.to_pylist()], np.int32)
    return torch.from_numpy(codes[encoded.indices.to_numpy()])


def _read_tokens(lists: pa.ListArray, ids: dict[str, int]) -> Tensor:
    """Look up the token ids [units, k] of lists of texts, int32, padded with -1."""
    return _pad_lists(lists, _look_up_ids(lists.flatten(), ids), -1)


def _read_examples(lists: pa.ListArray, ids: dict[str, int]) -> Examples:
    """Read one list of examples per unit; the reverse of `parquet._make_example_lists`."""
    flat = lists.flatten()  # [examples of all units]
    texts, strengths, peaks = flat.field("tokens"), flat.field("strengths"), flat.field("peak")
    lengths = _count_entries(texts)
    # for each token [entries]: its example, and its index in the example and in the window
    example = torch.arange(len(flat)).repeat_interleave(lengths)
    first_token = lengths.cumsum(0) - lengths  # [examples] index of each example's first token
    in_example = torch.arange(len(example)) - first_token[example]
    first_place = BEFORE - _read_integers(peaks, BEFORE)  # so that the peak is at index BEFORE
    in_window = first_place[example] + in_example
    # one empty example is added at the end, so that index -1 pads units with fewer than n
    tokens = torch.full((len(flat) + 1, WINDOW), -1, dtype=torch.int32)
    tokens[example, in_window] = _look_up_ids(texts.flatten(), ids)
    window = torch.zeros(len(flat) + 1, WINDOW, dtype=torch.float16)
    window[example, in_window] = _read_reals(strengths.flatten()).half()
    slots = _pad_lists(lists, torch.arange(len(flat)), -1)  # [units, n] index of the example
    return Examples(
        peak_strength=pad(_read_reals(flat.field("strength")), (0, 1))[slots],
        tokens=tokens[slots],
        strengths=window[slots],
        sequence=pad(_read_integers(flat.field("sequence"), MAX_TEXT_TOKENS), (0, 1))[slots],
        position=pad(_read_integers(flat.field("position"), MAX_TEXT_TOKENS), (0, 1)).int()[slots],
    )


def _rebuild_text(*lists: Examples) -> np.ndarray:
    """Rebuild the token ids [sequences, context] of the text, -1 where no example shows it;
    ValueError if there are more than MAX_TEXT_TOKENS."""
    parts = [[], [], []]  # of `sequence`, `place` and `tokens` below
    for examples in lists:
        place = examples.position[..., None] + torch.arange(-BEFORE, AFTER + 1)
        in_sequence = examples.tokens >= 0
        sequence = examples.sequence[..., None].expand_as(place)
        for part, values in zip(parts, (sequence, place, examples.tokens), strict=True):
            part.append(values[in_sequence].numpy())
    sequence, place, tokens = map(np.concatenate, parts)
    shape = sequence.max(initial=0) + 1, place.max(initial=0) + 1  # (1, 1) without examples
    if shape[0] * shape[1] > MAX_TEXT_TOKENS:
        raise ValueError(f"{shape[0]:,} sequences of {shape[1]:,} tokens")
    text = np.full(shape, -1, np.int32)
    text[sequence, place] = tokens
    return text
