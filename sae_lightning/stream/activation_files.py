"""Finds matrices of activations in files, by the names of sites, and reads rows of them.

data.path=acts/                     site from the name of   matrix
  resid.9/part-0.safetensors        a folder                resid.9, rows 0 to 999
  resid.9/part-1.safetensors        a folder                resid.9, rows 1000 to 1999
  mlp.9.npy                         a file                  mlp.9
  others.safetensors (tensor cls)   a tensor or column      resid.11 (data.sites={resid.11: cls})
"""

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream.local_files import list_files
from sae_lightning.stream.parquet_rows import copy_column, find_columns
from sae_lightning.stream.states import LLM_DTYPES

SUFFIXES = (".safetensors", ".npy", ".parquet")
UNNAMED = Site(0, Kind.resid)  # site of a matrix whose name is not that of a site
FINGERPRINT_ROWS = 1024  # rows in a fingerprint
OPEN_SHARDS = 128  # files kept open at a time: many systems allow a process only 1024 open files
# dtypes by their names in safetensors and in NumPy
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FLOATS |= {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}

Reader = Callable[[int, int], Tensor]  # start, stop -> rows [stop - start, width]


class MatrixShard(NamedTuple):
    """A tensor or column of a file: rows of a matrix [rows, width], unless it has a `refusal`."""

    file: str
    name: str | None
    """Name of the tensor or column; None in an .npy file and in a parquet file of plain columns."""
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A str, the dtype's name in the file, if it is not a dtype of floats."""
    names: tuple[str, ...]
    """What `data.sites` may call it: `name`, and the names of the file and its folders."""

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.name else self.file

    @property
    def refusal(self) -> str | None:
        """Why it cannot hold activations, with the remedy; None if it can."""
        if isinstance(self.dtype, str):
            return (
                f"holds {self.dtype}, not floats; save it as float32, float16 or (safetensors) "
                "bfloat16"
            )
        if len(self.shape) != 2 or not self.shape[1]:
            return f"has the shape {list(self.shape)}; save a matrix [rows, d]"
        return None

    def make_reader(self) -> Reader:
        """Return a function that reads the rows from `start` to `stop` - 1, from an mmap."""
        if self.file.lower().endswith(".safetensors"):
            tensor = safe_open(self.file, "pt").get_slice(self.name)
            return lambda start, stop: tensor[start:stop]
        file = self.file
        if file.lower().endswith(".parquet"):
            file = str(copy_column(file, self.name, *self.shape))
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        dtype = array.dtype.newbyteorder("=")  # torch takes only the machine's byte order
        return lambda start, stop: torch.from_numpy(np.array(array[start:stop], dtype, order="C"))


class SavedMatrix:
    """The activations [rows, width] at one site: its shards, one after another."""

    def __init__(
        self, site: Site, shards: Sequence[MatrixShard], open_shard: Callable[[MatrixShard], Reader]
    ) -> None:
        """`open_shard`: `MatrixShard.make_reader` with a cache, which all sites share."""
        self.site, self.shards, self._open_shard = site, shards, open_shard
        self.row_count, self.width = sum(shard.shape[0] for shard in shards), shards[0].shape[1]
        dtypes = {shard.dtype for shard in shards}
        keeps_dtype = len(dtypes) == 1 and shards[0].dtype in LLM_DTYPES
        self.dtype = shards[0].dtype if keeps_dtype else torch.float32  # for float64 or a mix
        self._ends = np.cumsum([shard.shape[0] for shard in shards])  # rows up to each shard's end

    def read_rows(self, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Read the rows start to stop - 1 of each range -> [n, width].

        UserError: a row is not finite, or a file is gone."""
        pieces = [piece for start, stop in ranges for piece in self._read_pieces(start, stop)]
        x = torch.cat(pieces)
        if not x.isfinite().all():
            first = int((~x.isfinite()).any(dim=1).nonzero()[0])
            rows = np.concatenate([np.arange(start, stop) for start, stop in ranges])
            shard, index = self._locate_row(rows[first])
            raise UserError(
                f"data.path: row {index} (from 0) of {shard} holds NaN or infinity; "
                "leave such rows out"
            )
        return x

    def try_files(self) -> None:
        """Open every file once. UserError: one cannot be read."""
        for shard in self.shards:
            self._get_reader(shard)

    def summarise_content(self) -> str:
        """Shape, and a checksum of at most FINGERPRINT_ROWS rows, evenly spaced."""
        checksum = 0
        count = min(self.row_count, FINGERPRINT_ROWS)
        for row in np.linspace(0, self.row_count - 1, count).astype(np.int64):
            (x,) = self._read_pieces(row, row + 1)
            checksum = zlib.crc32(x.contiguous().view(torch.uint8).numpy(), checksum)
        return f"{self.row_count} rows of {self.width}, crc32 {checksum:08x}"

    def _locate_row(self, row: int) -> tuple[MatrixShard, int]:
        """Find the shard that holds a row of the matrix, and the row's index in that shard."""
        shard_index = int(np.searchsorted(self._ends, row, side="right"))
        shard = self.shards[shard_index]
        first_row = self._ends[shard_index] - shard.shape[0]
        return shard, int(row - first_row)

    def _read_pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the rows `start` to `stop` - 1 as tensors [n, width], one from each shard."""
        while start < stop:
            shard, row = self._locate_row(start)
            count = min(int(stop - start), shard.shape[0] - row)
            yield self._get_reader(shard)(row, row + count).to(self.dtype)
            start += count

    def _get_reader(self, shard: MatrixShard) -> Reader:
        """Open a shard, or reuse the open one. UserError: it cannot be read."""
        with _explain_errors(shard.file):
            return self._open_shard(shard)


@contextmanager
def _explain_errors(file: str) -> Iterator[None]:
    """Turn errors of the libraries that read `file` into a UserError."""
    try:
        yield
    except UserError:  # a subclass of ValueError, which is caught below
        raise
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(
            f"data.path: {file} cannot be read ({str(error).splitlines()[0]}); repair it, or leave "
            "it out"
        ) from error


def parse_site(name: str) -> Site | None:
    """The site of a name such as `resid.9`; None for other names."""
    match = re.fullmatch(rf"({'|'.join(kind.value for kind in Kind)})\.(\d{{1,6}})", name)
    return match and Site(int(match[2]), Kind(match[1]))


def find_matrices(path: Path, names: Mapping[str, str], where: str) -> dict[Site, SavedMatrix]:
    """Find the matrices below `path`, reading only headers -> {site: matrix}.

    names: {site: name of a tensor, column, file or folder}; empty if these have names such as
    `resid.9`. If no name is that of a site, there must be one matrix: it is at `UNNAMED`. `where`
    names the data in messages. UserError: there is no file, or no matrix; a name in `names` does
    not occur; several matrices have no site; the shards of a site differ in width.
    """
    files = [file for file in list_files(path) if file.lower().endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{where}: no file there that ends in {', '.join(SUFFIXES)}")
    shards = [shard for file in files for shard in _list_shards(file, path)]
    site_by_name = {name: parse_site(site) for site, name in names.items()}
    find_site = site_by_name.get if names else parse_site  # both return None for other names
    by_site: dict[Site, list[MatrixShard]] = {}
    for shard in shards:
        sites = [site for site in map(find_site, shard.names) if site]
        if sites:
            by_site.setdefault(sites[0], []).append(shard)
    if missing := [name for name, site in site_by_name.items() if site not in by_site]:
        names_there = dict.fromkeys(name for shard in shards for name in shard.names)
        raise UserError(
            f"data.sites: {where} holds nothing that is called {missing[0]}; "
            f"there are {', '.join(names_there)}"
        )
    by_site = by_site or {UNNAMED: _pick_unnamed(shards, where)}
    open_shard = lru_cache(OPEN_SHARDS)(MatrixShard.make_reader)
    return {
        site: SavedMatrix(site, _check_shards(site, by_site[site], where), open_shard)
        for site in sorted(by_site)
    }


def _pick_unnamed(shards: Sequence[MatrixShard], where: str) -> list[MatrixShard]:
    """Pick the shards that can be one matrix. UserError: there is no matrix, or several."""
    usable = [shard for shard in shards if not shard.refusal]
    if not usable:
        refusal = f"{shards[0]} {shards[0].refusal}" if shards else "its files hold nothing"
        raise UserError(f"{where}: {refusal}")
    names = list(dict.fromkeys(shard.name for shard in usable))
    if len(names) > 1:  # at most one of these names is None
        raise UserError(
            f"{where}: holds several matrices ({', '.join(map(str, names))}); choose one as "
            f"'data.sites={{resid.0:{names[0] or names[1]}}}'"
        )
    return usable


def _check_shards(site: Site, shards: list[MatrixShard], where: str) -> list[MatrixShard]:
    """Return the shards. UserError: one has a `refusal`, or another width than the first."""
    first = shards[0]
    for shard in shards:
        if shard.refusal:
            raise UserError(f"{where}: {shard} {shard.refusal}")
        if shard.shape[1] != first.shape[1]:
            raise UserError(
                f"{where}: {first} has {first.shape[1]} columns, but {shard} has "
                f"{shard.shape[1]}; all rows of a site ({site}) must have the same width"
            )
    return shards


def _list_shards(file: str, path: Path) -> list[MatrixShard]:
    """List the tensors or columns of a file below `path`."""
    # `path` may be a file or a glob: then only folders below its deepest existing parent are names
    base = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
    relative = Path(os.path.relpath(file, base))
    path_names = (relative.stem, *reversed(relative.parts[:-1]))  # the innermost folder first
    with _explain_errors(file):
        entries = _read_headers(file)
    return [
        MatrixShard(file, name, tuple(shape), dtype, (name, *path_names) if name else path_names)
        for name, (shape, dtype) in entries.items()
    ]


def _read_headers(file: str) -> dict[str | None, tuple[Sequence[int], torch.dtype | str]]:
    """List what a file holds -> {name: (shape, dtype)}, as in `MatrixShard`."""
    if file.lower().endswith(".safetensors"):
        with safe_open(file, "pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            entries = {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}
            return _parse_dtypes(entries)
    if file.lower().endswith(".npy"):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        entries = {None: (array.shape, array.dtype.newbyteorder("=").name)}
    else:
        entries = find_columns(file)
    return _parse_dtypes(entries)


def _parse_dtypes(
    entries: dict[str | None, tuple[Sequence[int], str]],
) -> dict[str | None, tuple[Sequence[int], torch.dtype | str]]:
    """Replace the name of a float dtype by the dtype; keep other names."""
    return {name: (shape, FLOATS.get(dtype, dtype)) for name, (shape, dtype) in entries.items()}
