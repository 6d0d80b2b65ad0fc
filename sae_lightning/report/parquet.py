"""Writes catalogues as parquet files, one row per unit."""

import json
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from sae_lightning.files import write_atomically
from sae_lightning.report.catalogue import BEFORE, Catalogue, Examples, slice_units

UNITS_PER_GROUP = 8192  # units in a row group of the file, written at a time: bounds memory
METADATA_KEY = b"sae_lightning"  # key of the file's own metadata


def write_catalogue(path: Path, catalogue: Catalogue, origin: dict[str, str]) -> None:
    """Write `catalogue`; `origin` (name -> value), its SAE, LLM and text, goes into the metadata.

    Tokens are written as text. pandas, polars and datasets open the file; `parquet_reader` turns
    it back into a catalogue.
    """
    vocabulary = pa.array(catalogue.vocabulary)
    metadata = {METADATA_KEY: json.dumps({"tokens": catalogue.statistics.tokens, "of": origin})}
    with write_atomically(path) as temporary, ExitStack() as stack:
        writer = None
        for first in range(0, catalogue.num_units, UNITS_PER_GROUP):
            table = pa.table(_make_columns(catalogue, first, vocabulary), metadata=metadata)
            writer = writer or stack.enter_context(
                pyarrow.parquet.ParquetWriter(temporary, table.schema, compression="zstd")
            )
            writer.write_table(table)


def _make_columns(catalogue: Catalogue, first: int, vocabulary: pa.Array) -> dict[str, pa.Array]:
    """Make the columns of UNITS_PER_GROUP units, from unit `first` on."""
    catalogue = slice_units(catalogue, slice(first, first + UNITS_PER_GROUP))
    statistics = catalogue.statistics
    columns = {
        catalogue.kind: pa.array(range(first, first + catalogue.num_units)),
        "fired": _to_array(statistics.firing_counts),
        "density": _to_array(statistics.densities),
        "mean": _to_array(statistics.mean),
        "maximum": _to_array(statistics.maximum),
        # the mask is True everywhere: no count is below 0
        "histogram": _make_lists(statistics.histogram, statistics.histogram >= 0),
        "examples": _make_example_lists(catalogue.top, vocabulary),
        "examples_of_all_strengths": _make_example_lists(catalogue.random, vocabulary),
    }
    if (token_sets := catalogue.token_sets) is not None:
        columns["score"] = pa.array(token_sets.score.numpy(), from_pandas=True)  # NaN becomes null
        columns["tokens"] = _make_text_lists(token_sets.tokens, vocabulary)
        columns["tokens_are_previous"] = _to_array(token_sets.previous)
    if catalogue.informativeness is not None:
        # the file calls informativeness `telling`
        columns["telling"] = pa.array(catalogue.informativeness.numpy(), from_pandas=True)
        columns["copy_of"] = _to_array(catalogue.copy_of)
    for name, related in (("neighbour", catalogue.neighbours), ("partner", catalogue.partners)):
        if related is not None:
            columns[f"{name}s"] = _make_lists(related.units, related.units >= 0)
            # similarity to each: neighbours' cosine of decoder rows, partners' Jaccard index
            columns[f"{name}_likeness"] = _make_lists(related.similarity, related.units >= 0)
    if (effect := catalogue.effect) is not None:
        columns["promoted"] = _make_text_lists(effect.promoted, vocabulary)
        columns["suppressed"] = _make_text_lists(effect.suppressed, vocabulary)
        columns["sharpness"] = _to_array(effect.sharpness)
        if effect.histogram is not None:
            for name in ("raised", "lowered", "histogram"):
                values = getattr(effect, name)
                columns[f"effect_{name}"] = _make_lists(values, values == values)  # False for NaN
    if (bins := catalogue.linear_histogram) is not None:
        columns["linear_histogram"] = _make_lists(bins, bins >= 0)  # True everywhere
    return columns


def _to_array(values: Tensor) -> pa.Array:
    return pa.array(values.cpu().numpy())


def _make_lists(values: Tensor | pa.Array, mask: Tensor) -> pa.ListArray:
    """Make one list per row of `mask` [units, k]: the values of the row where the mask is True.
    `values`: a tensor [units, k], or an array of only those values, one after another."""
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(0)])
    flat = _to_array(values[mask]) if isinstance(values, Tensor) else values
    return pa.ListArray.from_arrays(ends.int().numpy(), flat)


def _make_text_lists(ids: Tensor, vocabulary: pa.Array) -> pa.ListArray:
    """Make one list per row of `ids` [units, k]: the texts of its tokens, without -1."""
    return _make_lists(vocabulary.take(_to_array(ids[ids >= 0])), ids >= 0)


def _make_example_lists(examples: Examples, vocabulary: pa.Array) -> pa.ListArray:
    """Make one list of examples per unit; tokens outside the sequence are left out."""
    exists = examples.peak_strength > 0  # [units, n]
    tokens, strengths = examples.tokens[exists], examples.strengths[exists]  # [examples, WINDOW]
    columns = {
        "strength": _to_array(examples.peak_strength[exists]),
        "sequence": _to_array(examples.sequence[exists]),
        "position": _to_array(examples.position[exists]),  # index of the peak in its sequence
        # index of the peak in tokens
        "peak": _to_array((tokens[:, :BEFORE] >= 0).sum(dim=1).int()),
        "tokens": _make_text_lists(tokens, vocabulary),
        "strengths": _make_lists(strengths.float(), tokens >= 0),
    }
    return _make_lists(pa.StructArray.from_arrays([*columns.values()], names=[*columns]), exists)
