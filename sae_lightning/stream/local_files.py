"""Finds the text files at a path, and checks that they can be read."""

import glob
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import fsspec

from sae_lightning.errors import UserError

LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
CSV_ROWS = 1000  # rows of a table checked at a time
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # decompressed as they are read


def pick_loader(file: str) -> str:
    """Pick the loader of the `datasets` library, by its name, that reads a file."""
    return LOADERS[_read_suffix(file)]


def find_files(path: Path, where: str) -> list[str]:
    """Find files of one format: `path` itself, all files below it, or all that it matches.

    `path` may be a glob. UserError if there are no files, an unsupported format or several formats;
    `where` begins its message."""
    files = list_files(path)
    if not files:
        raise UserError(f"{where}: no file there; give a file, a folder or a glob of text files")
    formats = sorted({_read_suffix(file) for file in files})
    unsupported = [name for name in formats if name not in LOADERS]
    if unsupported:
        raise UserError(
            f"{where}: cannot read files that end in {', '.join(unsupported)}; "
            f"those that can be read end in {', '.join(LOADERS)}"
        )
    if len({LOADERS[name] for name in formats}) > 1:
        raise UserError(
            f"{where}: holds several formats ({', '.join(formats)}); "
            f"choose one with a glob such as data.path='{path}/**/*{formats[0]}'"
        )
    for file in files:
        if "::" in file:
            raise UserError(f"{where}: datasets splits the name of {file} at its `::`; rename it")
        if file.lower().endswith(".zst") and find_spec("zstandard") is None:
            raise UserError(f"{where}: {file} needs the package zstandard: pip install zstandard")
    return files


def list_files(path: Path) -> list[str]:
    """List `path` itself, all files below it, or all that it matches, sorted. A file is listed
    once, even if several links lead to it, and not if its name begins with a dot."""
    if path.is_dir():
        paths = [os.path.join(folder, name) for folder, names in _walk(path) for name in names]
    else:
        paths = [str(path)] if path.exists() else list(match_glob(path))
    files = sorted(f for f in paths if os.path.isfile(f) and not Path(f).name.startswith("."))
    return list({os.path.realpath(file): os.path.abspath(file) for file in files}.values())


def make_absolute(path: str) -> str:
    """Make `path` absolute, with `~` expanded."""
    return os.path.abspath(os.path.expanduser(path))


def make_existing_absolute(path: str) -> str:
    """Make a path or glob absolute if something exists there; `~` is expanded in any case."""
    path = os.path.expanduser(path)
    exists = os.path.exists(path) or any(match_glob(Path(path)))
    return os.path.abspath(path) if exists else path


def open_file(file: str, mode: str, **options: Any) -> IO:
    """Open a file, decompressed as it is read."""
    return fsspec.filesystem("file").open(file, mode, compression="infer", **options)


def match_glob(pattern: Path) -> Iterator[str]:
    """Yield the paths that match a glob; its leading folders that exist are taken literally, even
    if their names look like a glob."""
    folder = next(parent for parent in pattern.parents if parent.exists())
    names = pattern.relative_to(folder).parts
    if "**" not in names:
        matches = glob.iglob(os.path.join(*names), root_dir=folder)
        yield from (str(folder / name) for name in matches)
        return
    first = names.index("**")  # `_walk` expands it, as `glob` follows circular links
    rest = names[first + 1 :] or ["*"]  # a final ** matches every file
    tops = match_glob(folder.joinpath(*names[:first])) if first else [folder]
    for top in tops:
        for subfolder, _ in _walk(top, hidden=False):
            yield from match_glob(Path(subfolder, *rest))


def _walk(top: str | Path, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Yield `top` and each folder below it once, also through links, with the names of its files;
    hidden folders only if `hidden`."""
    seen = set()
    for folder, subfolders, files in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()  # a link leads here again
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if hidden or not name.startswith("."))
        yield folder, files


def _read_suffix(file: str) -> str:
    """The suffix in lower case, not counting that of a compression: `.txt` for Notes.TXT.gz."""
    name = Path(Path(file).name.lower())
    inner = Path(name.stem).suffix if name.suffix in COMPRESSED else ""
    return inner or name.suffix or "(none)"


def check_files(files: list[str], where: str) -> None:
    """Raise UserError for the first file that cannot be read, line that is not UTF-8, or row that
    does not fit the earlier ones. Its message says where; messages of `datasets` do not."""
    for file in files:
        for _ in _read_lines(file, where):
            pass
    loader, types = pick_loader(files[0]), {}
    for file in files:
        if loader == "json":
            _check_json_rows(file, types, where)
        elif loader == "csv":
            _check_csv(file, where)


def _check_json_rows(file: str, types: dict[str, type], where: str) -> None:
    """Raise UserError for the first row that is not an object, or whose columns differ in type from
    those of earlier rows. `types`: {column: type} of the rows so far, which is updated."""
    for number, row in read_valid_json(file, where):
        at = f"{where}: row {number} of {file}"
        if not isinstance(row, dict):
            raise UserError(
                f"{at} holds {type(row).__name__}, not names with values; repair it, or leave it "
                "out"
            )
        for name, value in row.items():
            # a column may mix int and float
            column_type = float if type(value) is int else type(value)
            if value is not None and column_type is not types.setdefault(name, column_type):
                raise UserError(
                    f"{at} holds {type(value).__name__} in {name}, and an earlier row "
                    f"{types[name].__name__}; a column has one type"
                )


def _check_csv(file: str, where: str) -> None:
    """Raise UserError for the first line that does not fit the columns."""
    import pandas as pd

    try:
        for _ in pd.read_csv(file, dtype=str, na_filter=False, chunksize=CSV_ROWS):
            pass
    except pd.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise UserError(
            f"{where}: {file} cannot be read ({reason}); repair it, or leave it out"
        ) from error


def check_json(files: list[str], column: str, where: str) -> None:
    """Raise UserError for the first row that holds something other than text in `column`.

    The `datasets` library would silently turn the whole column into JSON strings. Invalid JSON is
    left to `datasets`, which reports it."""
    for file in files:
        with suppress(json.JSONDecodeError):
            for number, row in read_json_rows(file, where):
                value = row.get(column) if isinstance(row, dict) else None
                if not isinstance(value, str | None):
                    raise UserError(
                        f"data.column={column}: {where} holds {type(value).__name__} there, not "
                        f"text, in row {number} of {file}; its columns are {', '.join(row)}"
                    )


def read_json_rows(file: str, where: str) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of JSON lines or a JSON array; JSONDecodeError: it is neither."""
    lines = _read_lines(file, where)
    for number, line in enumerate(lines, 1):
        if number == 1 and line.lstrip().startswith("["):  # the whole file is one array
            yield from enumerate(json.loads("".join([line, *lines])), 1)
        elif line.strip():
            yield number, json.loads(line)


def read_valid_json(file: str, where: str) -> Iterator[tuple[int, Any]]:
    """Yield what `read_json_rows` yields; UserError where the file is not JSON."""
    number = 0
    try:
        for number, row in read_json_rows(file, where):
            yield number, row
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: {file} is not valid JSON after row {number} ({error.msg}); repair it, or "
            "leave it out"
        ) from error


def _read_lines(file: str, where: str) -> Iterator[str]:
    """Yield a file's lines as text; UserError for one that is not UTF-8."""
    for number, line in enumerate(_read_raw_lines(file, where), 1):
        try:
            # utf-8-sig drops the byte order mark that some editors write first
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x}"
            raise UserError(
                f"{where}: line {number} of {file} is not UTF-8 ({byte}); convert the file "
                "(iconv -f latin1 -t utf-8, if that is what it is), or leave it out"
            ) from error
        yield text


def _read_raw_lines(file: str, where: str) -> Iterator[bytes]:
    """Yield a file's lines, decompressed, as bytes."""
    try:
        with open_file(file, "rb") as content:
            yield from content
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{where}: {file} cannot be read ({reason}); repair it, or leave it out"
        ) from error
