"""Copies activations from parquet files to .npy files, once per file.

A parquet file is compressed in groups of up to a million rows, so it cannot be read in random
order; an .npy file is memory-mapped.
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_lightning.errors import UserError
from sae_lightning.files import write_atomically
from sae_lightning.stream.documents import prepare_text_cache
from sae_lightning.terminal import phase

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch

READ_ROWS = 1024  # rows converted at a time
ARROW_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


def find_columns(file: str) -> dict[str | None, tuple[list[int], str]]:
    """List the matrices of a parquet file -> {name: (shape, dtype)}: each column of lists or, if
    there are none, all columns of floats together, under the name None. If there are neither, list
    all columns, so that messages can say why they are no matrices."""
    import pyarrow.parquet as pq

    content = pq.ParquetFile(file)
    rows, schema = content.metadata.num_rows, content.schema_arrow
    matrices: dict[str | None, tuple[list[int], str]] = {}
    for field in schema:
        if _is_list(field.type):
            dtype = str(field.type.value_type)
            batch = next(content.iter_batches(1, columns=[field.name]), None) if rows else None
            first_list = batch.column(0)[0].as_py() if batch else None
            matrices[field.name] = [rows, len(first_list or [])], ARROW_FLOATS.get(dtype, dtype)
    if matrices:
        return matrices
    floats = [field for field in schema if str(field.type) in ARROW_FLOATS]
    dtypes = {ARROW_FLOATS[str(field.type)] for field in floats}
    if not floats:
        return {field.name: ([rows], str(field.type)) for field in schema}
    return {None: ([rows, len(floats)], dtypes.pop() if len(dtypes) == 1 else "float32")}


def copy_column(file: str, name: str | None, rows: int, width: int) -> Path:
    """Copy the matrix that `find_columns` calls `name` to the cache; returns the path of the copy,
    which is reused until the file's path, size or time changes.

    UserError: a row is missing, or has another length than the first one.
    """
    import pyarrow.parquet as pq

    _, dtype = find_columns(file)[name]
    stat = os.stat(file)
    identity = os.path.realpath(file), stat.st_size, stat.st_mtime_ns, name
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    copied = prepare_text_cache() / f"activations-{key}.npy"
    if copied.exists():
        return copied
    content = pq.ParquetFile(file)
    floats = [field.name for field in content.schema_arrow if str(field.type) in ARROW_FLOATS]
    columns = floats if name is None else [name]
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, width)}
    with (
        phase(f"copying {Path(file).name}", total=rows) as advance,
        write_atomically(copied) as temporary,
        open(temporary, "wb") as copy,
    ):
        np.lib.format.write_array_header_1_0(copy, header)
        first_row = 0
        for batch in content.iter_batches(READ_ROWS, columns=columns):
            array = _convert(batch, name, width, file, first_row)
            copy.write(np.ascontiguousarray(array, dtype).tobytes())
            first_row += len(batch)
            advance(len(batch))
    return copied


def _convert(
    batch: "RecordBatch", name: str | None, width: int, file: str, first_row: int
) -> np.ndarray:
    """Convert a batch of rows, from row `first_row` of the file, to an array [rows, width].
    UserError: a number is missing, or a row has another width."""
    import pyarrow.compute as pc

    columns = batch.columns
    if name is None:
        for column, field in zip(columns, batch.schema, strict=True):
            if column.null_count:
                row = first_row + column.is_null().index(True).as_py()
                raise UserError(f"data.path: {file}: row {row} (from 0) lacks {field.name}")
        return np.stack([column.to_numpy() for column in columns], axis=1)
    # a missing list gets the length -1, which never equals `width`
    lengths = pc.fill_null(pc.list_value_length(columns[0]), -1).to_numpy()
    values = columns[0].flatten()
    wrong = np.flatnonzero(lengths != width)
    if len(wrong) or values.null_count:
        # if all lengths are right, a number within a list is missing
        row = wrong[0] if len(wrong) else values.is_null().index(True).as_py() // width
        raise UserError(
            f"data.path: {file}: row {first_row + row} (from 0) of {name} is not a list of {width} "
            "numbers, as the first one is; leave it out"
        )
    return values.to_numpy().reshape(-1, width)


def _is_list(column_type: "DataType") -> bool:
    import pyarrow.types as types

    return (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    )
