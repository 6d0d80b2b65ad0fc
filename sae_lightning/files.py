"""Files that are there completely or not at all.

What is being written lies in a fresh folder beside its place, `.<name>.<random>.tmp`, that nobody
else may enter: no link can wait there for a writer, and what a killed writer leaves is known by the
lock in it that nobody holds.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from sae_lightning.errors import UserError, WriteError, list_causes

LOCK_FILE = ".lock"
RETRY = "put that right and give the same command again"


def _error_numbers(names: str) -> set[int]:
    """Numbers of the system's errors, of which some are not known everywhere."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


# What the system says to somebody who wants to write, and to one who may want to read.
WRITE_ERRORS = _error_numbers("ENOSPC EDQUOT EFBIG EROFS EEXIST")
SYSTEM_ERRORS = WRITE_ERRORS | _error_numbers(
    "EIO ESTALE EBUSY ENAMETOOLONG ELOOP EISDIR EACCES EPERM ENOTDIR ENOTCONN"
)
# Windows has neither. A pipe in a lock's place would wait for a reader.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path for `path`; put it in place, complete, when the block ends.

    A reader, or a run killed at any moment, sees the old file or the new one. A link in its place
    is replaced and not followed. WriteError: the system refused.
    """
    with convert_write_errors(path):
        path.parent.mkdir(exist_ok=True)
        with make_private_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # safetensors makes files that only their owner can read; a colleague may want to
            os.chmod(temporary, 0o666 & ~_read_umask())
            os.replace(temporary, path)


@contextmanager
def make_private_folder(path: Path) -> Iterator[Path]:
    """A folder for what is being written to `path`, beside it; gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with hold_lock(folder / LOCK_FILE):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove from `folder` what killed writers left there and nobody holds any more."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if not stat.S_ISDIR(left.lstat().st_mode):  # of version 0.1.0
                left.unlink()
            elif not (left / LOCK_FILE).exists():  # killed before it could lock it: empty
                left.rmdir()
            else:
                with hold_lock(left / LOCK_FILE) as guarded:
                    if guarded:
                        shutil.rmtree(left)


def refuse_link(folder: Path) -> None:
    """UserError if a link is in the place of a folder that we write to."""
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a link, through which files elsewhere could be written over: remove it, "
            "or put what it leads to in its place"
        )


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write to `path`, however deep a library hides it, into a
    WriteError, and raise a Ctrl-C that a library hides as itself."""
    try:
        yield
    except BaseException as error:
        for link in list_causes(error):
            if link is not error and isinstance(link, WriteError | KeyboardInterrupt | SystemExit):
                raise link from None
        why = find_system_error(error)
        if why is None and not path.parent.is_dir():
            why = "its folder is gone; was it deleted or renamed?"
        if why is None or isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            raise
        raise WriteError(
            f"cannot write to {path}: {why}; what was there before is unharmed"
        ) from error


def find_system_error(error: BaseException | None) -> str | None:
    """The system's reason behind an error, whether passed on, quoted or hidden; None for a bug."""
    for link in list_causes(error):
        # safetensors quotes the number; torch hides the error in the context of its own
        quoted = re.search(r"\(os error (\d+)\)", str(link))
        number = int(quoted[1]) if quoted else getattr(link, "errno", None)
        if number in SYSTEM_ERRORS:
            return _describe_errno(number)
    return None


def describe_system_error(error: BaseException) -> str | None:
    """One line about what the system refused, outside of `convert_write_errors` too."""
    if isinstance(error, WriteError):
        return f"{error}; {RETRY}"
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        what = "write" if error.errno in WRITE_ERRORS else "read or write"
        where = f" {error.filename}" if error.filename else ""
        why = _describe_errno(error.errno)
        return f"cannot {what}{where}: {why}; choose another folder, or {RETRY}"
    return None


def _describe_errno(number: int) -> str:
    if number == errno.ELOOP:
        return "a link is in its place, which is not followed"
    return os.strerror(number)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, indented for people."""
    text = json.dumps(make_jsonable(content), indent=2, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf8")


def make_jsonable(value: Any) -> Any:
    """`value` with tuples as lists, named ones as objects; NaN and infinity, which JSON has not,
    as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): make_jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [make_jsonable(inner) for inner in value]
    if isinstance(value, Enum):
        return value.name
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_regular_file(path: Path) -> str:
    """The text of a file that may be a stranger's. OSError: it is a pipe or a device, which might
    never end, or it cannot be read. ValueError: it is no UTF-8."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return path.read_text("utf8")


def read_free_space(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Keep everybody else, in this process or another, out of a block with the same `path`. Yields
    False where the file system has no locks, so that nobody is kept out.

    The system lifts the lock if the process dies; the file is removed when the block ends.
    BlockingIOError: it is held by somebody else. OSError: the file cannot be made, or is a link.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    try:
        guarded = _try_lock(file)
        if not _is_same_file(path, file):  # its holder has just removed it
            raise BlockingIOError(f"{path} is locked")
        try:
            yield guarded
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                if _is_same_file(path, file):  # and not that of another folder under the same name
                    path.unlink()
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        if lock_descriptor(file, blocking=False):
            return True
    except OSError as error:
        if error.errno in LOCKS_UNSUPPORTED:
            return False
        raise
    raise BlockingIOError("locked by somebody else")


def _is_same_file(path: Path, file: int) -> bool:
    """Whether `path` is the file that is open as `file`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False
