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

from sae_lightning.errors import UserError, WriteError, chain

LOCK = ".lock"
AGAIN = "put that right and give the same command again"


def _known(names: str) -> set[int]:
    """Numbers of the system's errors, of which some are not known everywhere."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


# What the system says to somebody who wants to write, and to one who may want to read.
WRITING = _known("ENOSPC EDQUOT EFBIG EROFS EEXIST")
REFUSALS = WRITING | _known(
    "EIO ESTALE EBUSY ENAMETOOLONG ELOOP EISDIR EACCES EPERM ENOTDIR ENOTCONN"
)
# Windows has neither. A pipe in a lock's place would wait for a reader.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path for `path`; put it in place, complete, when the block ends.

    A reader, or a run killed at any moment, sees the old file or the new one. A link in its place
    is replaced and not followed. WriteError: the system refused.
    """
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with private_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # safetensors makes files that only their owner can read; a colleague may want to
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)


@contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """A folder for what is being written to `path`, beside it; gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with lock(folder / LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove from `folder` what killed writers left there and nobody holds any more."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if not stat.S_ISDIR(left.lstat().st_mode):  # of version 0.1.0
                left.unlink()
            elif not (left / LOCK).exists():  # killed before it could lock it: empty
                left.rmdir()
            else:
                with lock(left / LOCK) as guarded:
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
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write to `path`, however deep a library hides it, into a
    WriteError, and raise a Ctrl-C that a library hides as itself."""
    try:
        yield
    except BaseException as error:
        for link in chain(error):
            if link is not error and isinstance(link, WriteError | KeyboardInterrupt | SystemExit):
                raise link from None
        why = reason(error)
        if why is None and not path.parent.is_dir():
            why = "its folder is gone; was it deleted or renamed?"
        if why is None or isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            raise
        raise WriteError(
            f"cannot write to {path}: {why}; what was there before is unharmed"
        ) from error


def reason(error: BaseException | None) -> str | None:
    """The system's reason behind an error, whether passed on, quoted or hidden; None for a bug."""
    for link in chain(error):
        # safetensors quotes the number; torch hides the error in the context of its own
        quoted = re.search(r"\(os error (\d+)\)", str(link))
        number = int(quoted[1]) if quoted else getattr(link, "errno", None)
        if number in REFUSALS:
            return _meaning(number)
    return None


def refusal(error: BaseException) -> str | None:
    """One line about what the system refused, outside of `writing` too."""
    if isinstance(error, WriteError):
        return f"{error}; {AGAIN}"
    if isinstance(error, OSError) and error.errno in REFUSALS:
        what = "write" if error.errno in WRITING else "read or write"
        where = f" {error.filename}" if error.filename else ""
        return f"cannot {what}{where}: {_meaning(error.errno)}; choose another folder, or {AGAIN}"
    return None


def _meaning(number: int) -> str:
    if number == errno.ELOOP:
        return "a link is in its place, which is not followed"
    return os.strerror(number)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, indented for people."""
    text = json.dumps(jsonable(content), indent=2, allow_nan=False)
    with atomically(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf8")


def jsonable(value: Any) -> Any:
    """`value` with tuples as lists, named ones as objects; NaN and infinity, which JSON has not,
    as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if isinstance(value, Enum):
        return value.name
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(path: Path) -> str:
    """The text of a file that may be a stranger's. OSError: it is a pipe or a device, which might
    never end, or it cannot be read. ValueError: it is no UTF-8."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return path.read_text("utf8")


def free_space(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Keep everybody else, in this process or another, out of a block with the same `path`. Yields
    False where the file system has no locks, so that nobody is kept out.

    The system lifts the lock if the process dies; the file is removed when the block ends.
    BlockingIOError: it is held by somebody else. OSError: the file cannot be made, or is a link.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    try:
        guarded = _lock(file)
        if not _is(path, file):  # its holder has just removed it
            raise BlockingIOError(f"{path} is locked")
        try:
            yield guarded
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                if _is(path, file):  # and not that of another folder under the same name
                    path.unlink()
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    try:
        if lock_descriptor(file, blocking=False):
            return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    raise BlockingIOError("locked by somebody else")


def _is(path: Path, file: int) -> bool:
    """Whether `path` is the file that is open as `file`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False
