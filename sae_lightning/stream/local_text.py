"""Copies text files to one Arrow file, in pieces, as a document may be larger than memory."""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sae_lightning.files import make_private_folder
from sae_lightning.stream.documents import prepare_text_cache
from sae_lightning.stream.local_files import open_file

if TYPE_CHECKING:
    from datasets import Dataset

READ_CHARACTERS = 1 << 20  # characters read at a time
WRITTEN_BYTES = 1 << 24  # short documents are joined up to this size and written together
WRITTEN_DOCUMENTS = 1000  # documents of `copy_documents` written at a time
SCHEMA = pa.schema({"text": pa.large_string()})  # of any length; a `string` array holds 2 GB


def copy_text_files(files: list[str]) -> "Dataset":
    """Make each file a document; the copy is reused until a file's name, size or time changes. (The
    text loader of `datasets` takes four times the memory of a document.)

    Raises OSError or UnicodeDecodeError.
    """
    return _copy(files, "", lambda folder: _read_documents(files, folder))


def copy_documents(files: list[str], documents: Iterator[str], reader_key: str) -> "Dataset":
    """Copy documents that are read from files; the copy is reused until a file's name, size or time
    changes. `reader_key` names the way of reading: each has a separate copy."""

    def make_arrays(_: Path) -> Iterator[pa.Array]:
        while group := list(islice(documents, WRITTEN_DOCUMENTS)):
            yield pa.array(group, pa.large_string())

    return _copy(files, reader_key, make_arrays)


def _copy(
    files: list[str], reader_key: str, make_arrays: Callable[[Path], Iterator[pa.Array]]
) -> "Dataset":
    """Write arrays of documents to a file in the cache, unless they are there, and open the file;
    `make_arrays` takes a folder for temporary files."""
    from datasets import Dataset

    stats = [(file, os.stat(file)) for file in files]
    versions = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    identity = (versions, reader_key) if reader_key else versions
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    cached = prepare_text_cache() / f"documents-{key}.arrow"
    if not cached.exists():
        with make_private_folder(cached) as folder:
            with open(folder / cached.name, "wb") as copy:
                with pa.ipc.new_stream(copy, SCHEMA) as stream:
                    for documents in make_arrays(folder):
                        stream.write_table(pa.table([documents], SCHEMA))
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(folder / cached.name, cached)
    return Dataset.from_file(str(cached))


def _read_documents(files: list[str], folder: Path) -> Iterator[pa.Array]:
    """Yield arrays of documents, a document for each file. Short files are joined in groups: each
    array is a view of a temporary file in `folder`, which holds its group."""
    remaining = iter(files)
    while True:
        with tempfile.TemporaryFile(dir=folder) as joined:
            ends = [0]
            for file in remaining:
                with open_file(file, "r", encoding="utf-8-sig") as content:
                    while piece := content.read(READ_CHARACTERS):
                        joined.write(piece.encode())
                ends.append(joined.tell())
                if ends[-1] >= WRITTEN_BYTES:
                    break
            if len(ends) == 1:  # no file was left
                return
            joined.flush()
            view = mmap.mmap(joined.fileno(), 0, access=mmap.ACCESS_READ) if ends[-1] else b""
        offsets = pa.py_buffer(np.array(ends, np.int64))
        yield pa.LargeStringArray.from_buffers(len(ends) - 1, offsets, pa.py_buffer(view))
