"""Atomic file writing, locks, and one-line messages for the operating system's errors.

A file is first written to a private folder beside its target, `.<name>.<random>.tmp`. Only the
owner may enter it, so that nobody else can plant a symbolic link there. A lock in the folder shows
whether the writer is still alive.
"""

import errno
import glob
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
RETRY = "correct this and run the same command again"


def _find_errnos(names: str) -> set[int]:
    """Error numbers of `names`, separated by spaces; names that this platform lacks are ignored."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


# WRITE_ERRORS occur only in writing, the other SYSTEM_ERRORS also in reading.
WRITE_ERRORS = _find_errnos("ENOSPC EDQUOT EFBIG EROFS EEXIST")
SYSTEM_ERRORS = WRITE_ERRORS | _find_errnos(
    "EIO ESTALE EBUSY ENAMETOOLONG ELOOP EISDIR EACCES EPERM ENOTDIR ENOTCONN"
)
# Flags for opening a lock file: do not follow a link, and do not wait for a pipe or a device.
# Windows lacks both.
LOCK_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` when the block ends.

    A reader sees the whole old or new file, even if the writer is killed. A symbolic link at `path`
    is replaced, not followed. WriteError if the system refuses.
    """
    with convert_write_errors(path):
        path.parent.mkdir(exist_ok=True)
        with make_private_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # safetensors makes files that only the owner can read: set the usual permissions
            os.chmod(temporary, 0o666 & ~_read_umask())
            os.replace(temporary, path)


@contextmanager
def make_private_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, locked, and removed when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with hold_lock(folder / LOCK_FILE):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders that killed writers left in `folder`: all of them, or those made
    for the file `name`."""
    pattern = f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"
    for leftover in folder.glob(pattern):
        with suppress(OSError):  # also BlockingIOError: the writer is alive and holds the lock
            if not stat.S_ISDIR(leftover.lstat().st_mode):  # version 0.1.0 wrote files
                leftover.unlink()
            elif not (leftover / LOCK_FILE).exists():  # its writer was killed before it locked
                leftover.rmdir()
            else:
                with hold_lock(leftover / LOCK_FILE) as locked:
                    if locked:  # False if there are no locks: the writer may be alive
                        shutil.rmtree(leftover)


def refuse_link(folder: Path) -> None:
    """UserError if `folder`, where files will be written, is a symbolic link."""
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a symbolic link, through which files elsewhere could be overwritten: "
            "remove it, or put its target in its place"
        )


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Raise a WriteError if the system refuses to write to `path`, even if a library has wrapped
    the system's error. A WriteError, KeyboardInterrupt or SystemExit that a library has wrapped is
    raised as it was."""
    try:
        yield
    except BaseException as error:
        for cause in list_causes(error):
            if cause is not error and isinstance(
                cause, WriteError | KeyboardInterrupt | SystemExit
            ):
                raise cause from None
        reason = find_system_error(error)
        if reason is None and not path.parent.is_dir():
            reason = "its folder is gone; was it deleted or renamed?"
        if reason is None or isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            raise
        raise WriteError(
            f"cannot write to {path}: {reason}; the old file, if any, is intact"
        ) from error


def find_system_error(error: BaseException | None) -> str | None:
    """The message of the system error that is or caused `error`; None if there is none."""
    for cause in list_causes(error):
        match = re.search(r"\(os error (\d+)\)", str(cause))  # how safetensors gives the errno
        number = int(match[1]) if match else getattr(cause, "errno", None)
        if number in SYSTEM_ERRORS:
            return _describe_errno(number)
    return None


def describe_system_error(error: BaseException) -> str | None:
    """One line about a file system error; None for any other error."""
    if isinstance(error, WriteError):
        return f"{error}; {RETRY}"
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        action = "write" if error.errno in WRITE_ERRORS else "read or write"
        file = f" {error.filename}" if error.filename else ""
        reason = _describe_errno(error.errno)
        return f"cannot {action}{file}: {reason}; choose another folder, or {RETRY}"
    return None


def _describe_errno(number: int) -> str:
    if number == errno.ELOOP:
        return "it is a symbolic link, which is not followed"
    return os.strerror(number)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, indented."""
    text = json.dumps(make_jsonable(content), indent=2, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf8")


def make_jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: tuples as lists, named tuples as objects, enums as their names,
    NaN and infinity as null."""
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
    """The text of an untrusted file. OSError if it cannot be read, or is a pipe or device, which
    may never end; ValueError if it is not UTF-8."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_text("utf8")


def read_free_space(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`, against other processes and other callers in this
    process. Yields whether it is locked: False if the file system does not support locks.

    The system releases the lock if the process dies; the file is removed when the block ends.
    BlockingIOError if it is locked already; OSError if it cannot be made or is a symbolic link.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | LOCK_FLAGS, 0o666)
    try:
        locked = _try_lock(descriptor)
        if not _is_same_file(path, descriptor):  # the previous holder has just removed it
            raise BlockingIOError(f"{path} is locked")
        try:
            yield locked
        finally:
            with suppress(OSError):  # Windows cannot delete an open file
                if _is_same_file(path, descriptor):  # the folder may have been replaced
                    path.unlink()
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock a file; False if its file system has no locks. BlockingIOError if it is locked."""
    try:
        if lock_descriptor(descriptor, blocking=False):
            return True
    except OSError as error:
        if error.errno in LOCKS_UNSUPPORTED:
            return False
        raise
    raise BlockingIOError("the file is locked")


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether `path` is the file that is open as `descriptor`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
