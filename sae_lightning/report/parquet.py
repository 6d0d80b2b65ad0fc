"""Catalogues as parquet files: one row a unit, for programs."""

from pathlib import Path

import torch
from torch import Tensor

from sae_lightning.files import atomically
from sae_lightning.report.catalogue import Catalogue, Examples


def write_table(path: Path, catalogue: Catalogue) -> None:
    """Write everything in `catalogue`; tokens are written as they read.

    pandas.read_parquet, polars or datasets open it.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    words = pa.array(catalogue.vocabulary)
    s = catalogue.statistics
    columns = {
        catalogue.kind: pa.array(range(catalogue.units)),
        "fired": _numbers(s.fired),
        "density": _numbers(s.density),
        "mean": _numbers(s.mean),
        "maximum": _numbers(s.maximum),
        "histogram": _lists(s.histogram, s.histogram >= 0, pa),
        "examples": _examples(catalogue.top, words, pa),
        "examples_of_all_strengths": _examples(catalogue.spread, words, pa),
    }
    if (r := catalogue.reading) is not None:
        columns["score"] = pa.array(r.score.numpy(), from_pandas=True)  # nan becomes null
        columns["tokens"] = _texts(r.tokens, words, pa)
        columns["tokens_are_previous"] = _numbers(r.previous)
    for name, related in (("neighbour", catalogue.neighbours), ("partner", catalogue.partners)):
        if related is not None:
            known = related.units >= 0
            columns[f"{name}s"] = _lists(related.units, known, pa)
            columns[f"{name}_likeness"] = _lists(related.likeness, known, pa)
    if (e := catalogue.effect) is not None:
        columns["promoted"] = _texts(e.promoted, words, pa)
        columns["suppressed"] = _texts(e.suppressed, words, pa)
        columns["sharpness"] = _numbers(e.sharpness)
    with atomically(path) as temporary:
        parquet.write_table(pa.table(columns), temporary, compression="zstd")


def _numbers(values: Tensor):
    return values.cpu().numpy()


def _lists(values: Tensor, known: Tensor, pa):
    """A list of the `known` values of each row; both [units, k]."""
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), known.sum(dim=1).cumsum(0)])
    return pa.ListArray.from_arrays(ends.int().numpy(), pa.array(values[known].cpu().numpy()))


def _texts(ids: Tensor, words, pa):
    """A list of the tokens of each row [units, k] as they read; -1 is none."""
    known = ids >= 0
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), known.sum(dim=1).cumsum(0)])
    return pa.ListArray.from_arrays(ends.int().numpy(), words.take(_ids(ids[known], pa)))


def _ids(ids: Tensor, pa):
    return pa.array(ids.cpu().int().numpy())


def _examples(examples: Examples, words, pa):
    """A list of examples of each unit; an example has as many tokens as there are inside of the
    sequence."""
    there = examples.strength > 0  # [units, n]
    tokens, strengths = examples.tokens[there], examples.strengths[there]  # [examples, WINDOW]
    inside = tokens >= 0
    struct = pa.StructArray.from_arrays(
        [
            pa.array(examples.strength[there].numpy()),
            pa.array(examples.sequence[there].numpy()),
            _texts(tokens, words, pa),
            _lists(strengths.float(), inside, pa),
        ],
        names=["strength", "sequence", "tokens", "strengths"],
    )
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(dim=1).cumsum(0)])
    return pa.ListArray.from_arrays(ends.int().numpy(), struct)
