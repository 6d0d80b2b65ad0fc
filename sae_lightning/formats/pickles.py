"""Files that torch.save wrote, whoever may have written them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile
from zlib import crc32

import torch

from sae_lightning.errors import is_out_of_memory


def load_tensors(path: Path, seen: set | None = None) -> Any:
    """Tensors, numbers and texts of a file, mapped into memory on the CPU; no code in it runs.

    ValueError: a part of it (a tensor, the pickle around them) has another checksum than it was
    written with, or it holds something else. OSError: the disk does not give it. Checksums of a
    file in `seen`, under whatever name, are not looked at again.
    """
    try:
        stat, seen = path.stat(), set() if seen is None else seen
        if (stat.st_dev, stat.st_ino) not in seen:
            with ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged[:80]!r} is wrong")
            seen.add((stat.st_dev, stat.st_ino))
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, ValueError):
        raise
    except UnpicklingError:  # torch's text tells how to load it all the same
        raise ValueError("it holds more than tensors and numbers, which could run code") from None
    except Exception as error:  # whatever a damaged archive leads to
        if is_out_of_memory(error):
            raise
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error


def read_checksum(path: Path) -> int:
    """Checksum of a file that torch.save wrote, by those that it holds of its parts: no part is
    read, so it takes `load_tensors` to know that they are right."""
    with ZipFile(path) as file:
        return crc32(repr([(part.filename, part.CRC) for part in file.infolist()]).encode())
