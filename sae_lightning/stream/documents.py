"""Documents of a text: those to train on, and others held out; one column, `text`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.files import NO_LOCKS, WRITING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Not the run's seed: runs that differ in their seed are scored on the same held-out documents.
HOLD_OUT_SEED = 0
OFFLINE_PRESETS = "data=shakespeare (the packaged plays) or data=text (your own files)"


class Text(NamedTuple):
    """Documents in two parts that share none."""

    train: "Dataset | IterableDataset"
    """What training reads; one column, `text`."""

    held_out: "Dataset | IterableDataset"
    """What only evaluation reads; one column, `text`; may be empty."""

    where: str = "data"
    """The setting that names the text and its value, for messages."""


def documents(texts: list[str], features: Any = None) -> "Dataset":
    """A data set of these texts."""
    from datasets import Dataset, Features, Value

    return Dataset.from_dict({"text": texts}, features or Features({"text": Value("string")}))


def hold_out(data: "Dataset", share: float) -> Text:
    """About that share of the text, by its bytes, held out: documents at fixed random places.

    So many documents, or, where they are far from that share of the text, as many as come nearest
    to it; where no number of whole documents does, one is cut and its last words are held out.
    """
    import pyarrow.compute as pc

    column = data.with_format("arrow")[:].column("text")
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(data))
    held = np.concatenate([[0], np.cumsum(sizes[order])])  # bytes of the first n documents
    count = min(max(1, round(share * len(data))), len(data) - 1)
    last = int(np.searchsorted(held[1:], share * held[-1]))  # with this one the share is reached
    least, most = share / 2, min(4 * share, (1 + share) / 2)
    for n in (count, last + 1, last):
        if least * held[-1] <= held[n] <= most * held[-1]:
            # in the files' own order: reading stays sequential, shuffling comes later
            return Text(data.select(np.sort(order[n:])), data.select(np.sort(order[:n])))
    size = sizes[order[last]]
    begin, end = _cut(data[int(order[last])]["text"], share * (held[-1] / size) - held[last] / size)
    parts = (order[last + 1 :], begin), (order[:last], end)
    return Text(*(_joined(data.select(np.sort(whole)), text) for whole, text in parts))


def _cut(text: str, share: float) -> tuple[str, str]:
    """A text and its last words: that share, or more where words begin; at most twice as much, and
    at least half of the rest stays."""
    cut = int(len(text) * (1 - share))
    first = max(cut // 2, 2 * cut - len(text))
    cut = text.rfind("\n", first, cut) + 1 or text.rfind(" ", first, cut) + 1 or cut
    return text[:cut], text[cut:]


def _joined(data: "Dataset", text: str) -> "Dataset":
    from datasets import concatenate_datasets

    return concatenate_datasets([data, documents([text], data.features)])


def only_text(data: Any, row: dict | None, column: str, where: str) -> Any:
    """`data` with its one column `text`, after a look at its first row."""
    if row is None:
        raise UserError(f"{where}: there is no document in it; give data that holds text")
    if column not in row:
        raise UserError(
            f"data.column={column}: {where} has no such column; it has {', '.join(row)}"
        )
    if not isinstance(row[column], str | None):
        raise UserError(
            f"data.column={column}: {where} holds {type(row[column]).__name__} there, not text; "
            f"its columns are {', '.join(row)}"
        )
    kind = (data.features or {}).get(column)
    if hasattr(data, "__len__") and getattr(kind, "dtype", "") not in ("string", "large_string"):
        for number, value in enumerate(data[column], 1):  # a column of anything
            if not isinstance(value, str | None):
                raise UserError(
                    f"data.column={column}: {where} holds {type(value).__name__} there, not text, "
                    f"in row {number}; its columns are {', '.join(row)}"
                )
    data = data.select_columns([column])
    return data if column == "text" else data.rename_column(column, "text")


def first_line(error: Exception) -> str:
    """The first line of what went wrong underneath; datasets hides it in the cause, and what it
    cannot write is its own copy of the text."""
    error = error.__cause__ or error
    if isinstance(error, OSError) and _of_the_copy(error):
        from datasets.config import HF_DATASETS_CACHE

        why = f"its copy in {HF_DATASETS_CACHE}: {error.strerror}"
        return f"{why}; set HF_DATASETS_CACHE to another folder"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _of_the_copy(error: OSError) -> bool:
    """Whether it was datasets' copy of a text that was refused, or a folder that it is in."""
    from datasets.config import HF_DATASETS_CACHE

    cache, named = Path(HF_DATASETS_CACHE), Path(str(error.filename))
    there = cache.is_relative_to(named) or named.is_relative_to(cache)
    return error.errno in {*WRITING, *NO_LOCKS} or there
