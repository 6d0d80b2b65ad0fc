"""Splits the documents of a text into training and held-out documents."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.files import LOCKS_UNSUPPORTED, WRITE_ERRORS, remove_leftovers

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pyarrow import Buffer, ChunkedArray

# Not the run's seed: runs that differ in their seed are scored on the same held-out documents.
HOLD_OUT_SEED = 0
SCANNED_BYTES = 1 << 20  # bytes of a document scanned at a time
OFFLINE_PRESETS = "data=shakespeare (the packaged plays) or data=text (your own files)"


class SplitDocuments(NamedTuple):
    """Training and held-out documents; none is in both, though one may be cut in two."""

    train: "Dataset | IterableDataset"
    """What training reads; one column, `text`."""

    held_out: "Dataset | IterableDataset"
    """What only evaluation reads; one column, `text`; may be empty."""

    where: str = "data"
    """The setting that names the text, with its value: the beginning of messages."""

    assistant_only: bool | None = None
    """None if documents are text. If they are conversations (see `copy_chats`), whether to train
    on the assistant's tokens only."""

    weight: float = 1.0
    """Share of the tokens, in a mixture."""

    others: tuple["SplitDocuments", ...] = ()
    """The texts of a mixture, except this one, which is the first."""


class Documents(NamedTuple):
    """Documents with all their columns."""

    data: "Dataset | IterableDataset"
    first_row: dict | None
    """{column: value}, or None if there is no document. For local files, every value is None."""
    where: str
    """The setting that names the data, with its value: the beginning of messages."""


def make_documents(texts: list[str]) -> "Dataset":
    """Make a data set with a row for each text."""
    from datasets import Dataset, Features, Value

    return Dataset.from_dict({"text": texts}, Features({"text": Value("string")}))


def prepare_text_cache() -> Path:
    """Create and return our folder for copies of data, in the cache of `datasets`, and remove what
    killed writers left there."""
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(HF_DATASETS_CACHE) / "sae_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    return folder


def hold_out(data: "Dataset", share: float, whole: bool = False) -> SplitDocuments:
    """Hold out about `share` of the text's bytes: a fixed random sample of the documents.

    Three sizes of the sample are tried: `share` of the documents, as many as just reach `share` of
    the bytes, and one fewer. The first one whose bytes are near `share` of all is taken. If there
    is none, a document is cut and its end held out. With `whole`, the first size is taken anyway.
    """
    import pyarrow.compute as pc

    column = data.with_format("arrow")[:].column("text")
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(data))
    sums = np.concatenate([[0], np.cumsum(sizes[order])])  # bytes of the first n in `order`
    count = min(max(1, round(share * len(data))), len(data) - 1)  # leaves one to train on
    last = int(np.searchsorted(sums[1:], share * sums[-1]))  # the document that reaches the share
    # near the share: from half of it to four times it, and at most halfway from it to 1
    lowest, highest = share / 2, min(4 * share, (1 + share) / 2)
    sample_sizes = (count,) if whole else (count, last + 1, last)
    for n in sample_sizes:
        if whole or lowest * sums[-1] <= sums[n] <= highest * sums[-1]:
            # sorted, so that files are read from front to back; shuffling comes later
            return SplitDocuments(data.select(np.sort(order[n:])), data.select(np.sort(order[:n])))
    row, size = int(order[last]), sizes[order[last]]
    (text,) = view_texts(column.slice(row, 1))
    missing_share = share * (sums[-1] / size) - sums[last] / size  # of `row`, still to hold out
    cut = _find_cut(text, missing_share)
    train = _append_part(data, np.sort(order[last + 1 :]), text[:cut], f"{row} {cut}")
    held_out = _append_part(data, np.sort(order[:last]), text[cut:], f"{row} {cut}")
    return SplitDocuments(train, held_out)


def view_texts(column: "ChunkedArray") -> Iterator["Buffer"]:
    """Yield each text of a column as a view, without a copy; for null, an empty one."""
    import pyarrow as pa

    for array in column.chunks:
        _, offset_bytes, texts = array.buffers()
        dtype = np.int64 if pa.types.is_large_string(array.type) else np.int32
        first, last = array.offset, array.offset + len(array)  # `array` may be a slice
        offsets = np.frombuffer(offset_bytes or b"", dtype)[first : last + 1].tolist()
        valid = array.is_valid().tolist()
        for start, end, is_text in zip(offsets, offsets[1:], valid, strict=False):
            yield texts[start:end] if is_text and end > start else pa.py_buffer(b"")


def _find_cut(text: "Buffer", share: float) -> int:
    """Find the byte at which to cut off the last `share` of a text's characters. The cut moves back
    to the beginning of a line or else of a word, by at most `share` of the text and at most half of
    the part before it."""
    characters = sum(np.count_nonzero(begins) for begins in _mark_characters(text))
    cut = int(characters * (1 - share))
    cut_off = characters - cut
    first = _find_byte(text, max(cut // 2, cut - cut_off))
    last = _find_byte(text, cut)
    return _find_last(b"\n", text, first, last) or _find_last(b" ", text, first, last) or last


def _mark_characters(text: "Buffer") -> Iterator[np.ndarray]:
    """Yield, SCANNED_BYTES at a time, whether each byte of UTF-8 begins a character."""
    for start in range(0, len(text), SCANNED_BYTES):
        # the later bytes of a character are 10xxxxxx
        yield (np.frombuffer(text[start : start + SCANNED_BYTES], np.uint8) & 0xC0) != 0x80


def _find_byte(text: "Buffer", index: int) -> int:
    """Find the byte at which character `index` begins, or the text's end if there is none."""
    start = 0
    for begins in _mark_characters(text):
        first_bytes = np.flatnonzero(begins)
        if index < len(first_bytes):
            return start + int(first_bytes[index])
        index, start = index - len(first_bytes), start + len(begins)
    return start


def _find_last(character: bytes, text: "Buffer", first: int, last: int) -> int:
    """Find the byte after the last `character` between two bytes; 0 if there is none."""
    for end in range(last, first, -SCANNED_BYTES):
        start = max(first, end - SCANNED_BYTES)
        index = text[start:end].to_pybytes().rfind(character)
        if index >= 0:
            return start + index + 1
    return 0


def _append_part(data: "Dataset", rows: np.ndarray, part: "Buffer", name: str) -> "Dataset":
    """Append a part of a document to some `rows` of its data set, without copies; `name` tells the
    fingerprints of different cuts apart."""
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets
    from datasets.table import concat_tables

    text_type = data.data.schema.field("text").type
    ends = np.array([0, len(part)], np.int64 if pa.types.is_large_string(text_type) else np.int32)
    text = pa.Array.from_buffers(text_type, 1, [None, pa.py_buffer(ends), part])
    # zero rows of `data` bring its `cache_files`, even if `rows` is empty: tokens are then cached
    table = concat_tables([data.data.slice(0, 0), pa.table({"text": text})])
    key = hashlib.sha256(f"{data._fingerprint} {name} {len(part)}".encode()).hexdigest()[:16]
    return concatenate_datasets([data.select(rows), Dataset(table, fingerprint=key)])


def keep_text_column(documents: Documents, column: str) -> "Dataset | IterableDataset":
    """Keep one column and call it `text`. UserError: no such column, or it is not text."""
    data, row, where = documents
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
    feature = (data.features or {}).get(column)  # the column's type, in datasets' words
    if hasattr(data, "__len__") and getattr(feature, "dtype", "") not in ("string", "large_string"):
        # the column may hold anything: check every row
        for number, value in enumerate(data[column], 1):
            if not isinstance(value, str | None):
                raise UserError(
                    f"data.column={column}: {where} holds {type(value).__name__} there, not text, "
                    f"in row {number}; its columns are {', '.join(row)}"
                )
    data = data.select_columns([column])
    return data if column == "text" else data.rename_column(column, "text")


def summarise_cause(error: Exception) -> str:
    """Return the first line of an error's cause (where `datasets` hides the reason) or, if
    `datasets` could not write its copy of the text, the reason and a remedy."""
    cause = error.__cause__ or error
    if concerns_copy(error):
        from datasets.config import HF_DATASETS_CACHE

        why = f"its copy in {HF_DATASETS_CACHE}: {cause.strerror}"
        return f"{why}; set HF_DATASETS_CACHE to another folder"
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


def concerns_copy(error: Exception) -> bool:
    """Whether an error is a failed write or lock, or names a path in or above `datasets`' cache."""
    from datasets.config import HF_DATASETS_CACHE

    error = error.__cause__ or error
    if not isinstance(error, OSError):
        return False
    cache, path = Path(HF_DATASETS_CACHE), Path(str(error.filename))
    in_cache = cache.is_relative_to(path) or path.is_relative_to(cache)
    return error.errno in {*WRITE_ERRORS, *LOCKS_UNSUPPORTED} or in_cache
