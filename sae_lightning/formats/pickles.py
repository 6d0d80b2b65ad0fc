"""Reads files written by torch.save, which may be damaged or malicious."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile
from zlib import crc32

import torch

from sae_lightning.errors import is_out_of_memory


def load_tensors(path: Path, verified: set | None = None) -> Any:
    """Load tensors, numbers and strings from a file, mmapped on the CPU; runs no code from it.

    ValueError if a checksum is wrong or the file holds other objects, OSError if it cannot be read.
    `verified` collects the files (device and inode) whose checksums are verified, so that no file
    is verified twice.
    """
    verified = set() if verified is None else verified
    try:
        stat = path.stat()
        if (stat.st_dev, stat.st_ino) not in verified:
            with ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged[:80]!r} is wrong")
            verified.add((stat.st_dev, stat.st_ino))
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, ValueError):
        raise
    except UnpicklingError:  # torch's message explains how to load it anyway
        raise ValueError("it holds more than tensors and numbers, which could run code") from None
    except Exception as error:  # a damaged archive may raise anything
        if is_out_of_memory(error):
            raise
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error


def read_checksum(path: Path) -> int:
    """One checksum for a file written by torch.save: a CRC-32 of the CRC-32s that its zip archive
    stores, one for each entry. The entries are not read; `load_tensors` verifies them."""
    with ZipFile(path) as file:
        return crc32(repr([(part.filename, part.CRC) for part in file.infolist()]).encode())
