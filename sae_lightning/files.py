"""Files that are there completely or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sae_lightning.errors import UserError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; put it in place, complete, when the block ends.

    A reader, or a run killed at any moment, sees the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # safetensors makes files that only their owner can read; a colleague may want to
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        # not every writer passes the system's error on; all of them quote it
        full = getattr(error, "errno", None) == errno.ENOSPC or "space left" in str(error)
        temporary.unlink(missing_ok=True)
        if full:
            raise UserError(
                f"no space left for {path}: what was there before is unharmed; free some space "
                "and resume"
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict) -> None:
    """Write `content` to `path` atomically, indented for people."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")


def free_space(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` or its nearest existing parent."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep everybody else, in this process or another, out of a block with the same `path`.

    The system lifts the lock if the process dies; the file is removed when the block ends.
    BlockingIOError: it is held by somebody else. OSError: the file cannot be made.
    """
    held = FileLock(path, thread_local=False)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(f"{path} is locked") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            path.unlink()
        held.release()
