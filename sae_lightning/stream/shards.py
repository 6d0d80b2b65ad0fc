"""The activation cache on disk: one folder a key, in it one folder a shard.

0f3c5a.../
    manifest.json        the settings that the key was made from, for people
    .lock                held by the process that writes
    00000000/            the shard that begins with LLM batch 0
        shard.json       rows and text of each LLM batch; size, dtype and checksum of each file
        ids              [rows] int64, the sequence of each row
        resid.9          [rows, d], one file a site, in the LLM's dtype
        state.pt         where the LLM and the text were at its beginning
    00000112/            the next one
    .00000224.tmp/       one that is being written, or was when its writer was killed

A shard appears by one renaming when all of it is on disk, and nothing ever changes what earlier
shards say: there is no list of shards that a crash could leave behind the truth. A shard needs no
other one, so that one that is damaged, or was never finished, is made again alone.
"""

import io
import json
import os
import shutil
import weakref
import zlib
from bisect import insort
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_lightning.files import write_json
from sae_lightning.llm.sites import Site
from sae_lightning.stream.base import Rows, RowSource
from sae_lightning.terminal import console

MANIFEST, SHARD, STATE, IDS = "manifest.json", "shard.json", "state.pt", "ids"


class Shard:
    """Consecutive LLM batches `first` to `stop` - 1, memory-mapped once they are opened."""

    def __init__(self, folder: Path) -> None:
        """Read what the shard says of itself; OSError, ValueError, KeyError if that is damaged."""
        about = json.loads((folder / SHARD).read_text("utf8"))
        if about.pop("crc32") != checksum(about):
            raise ValueError(f"{folder / SHARD} is damaged")
        self.folder, self.first = folder, int(folder.name)
        self.rows: list[int] = about["rows"]  # of each LLM batch
        self.epochs: list[int] = about["epochs"]  # after each LLM batch
        self.texts: list[int] = about["texts"]  # crc32 of the tokens of each LLM batch
        self.files: dict[str, dict[str, Any]] = about["files"]
        self.stop = self.first + len(self.rows)
        self._starts = np.cumsum([0, *self.rows])
        self._open: dict[str, Tensor] = {}

    def __lt__(self, other: "Shard") -> bool:
        return self.first < other.first

    def lacks(self, sites: Iterable[Site]) -> list[Site]:
        """Those of `sites` that it does not hold."""
        return [site for site in sites if str(site) not in self.files]

    def check(self, names: Iterable[str]) -> list[str]:
        """Map the files, and return those that are not as they were written."""
        damaged = []
        for name in names:
            about = self.files[name]
            path = self.folder / name
            try:
                # a shorter file would be mapped, and end the process when read beyond its end
                whole = path.stat().st_size == about["bytes"]
                data = _mapped(path, about["bytes"])
            except (OSError, RuntimeError):
                whole = False
            if not whole or zlib.crc32(data.numpy()) != about["crc32"]:
                damaged.append(name)
            elif name == STATE:
                self._open[name] = data
            else:
                dtype = getattr(torch, about["dtype"])
                self._open[name] = data.view(dtype).view(int(self._starts[-1]), *about["row"])
        return damaged

    def close(self) -> None:
        """Unmap the files."""
        self._open = {}

    def state(self) -> dict[str, Any]:
        """The source's state before the shard's first LLM batch; `check` has opened the file."""
        return torch.load(io.BytesIO(self._open[STATE].numpy().tobytes()), weights_only=True)

    def ids(self, llm_batch: int) -> Tensor:
        """Sequence ids [n] of the rows of an LLM batch; `check` has opened the file."""
        return self._part(IDS, llm_batch)

    def batch(self, llm_batch: int, sites: Iterable[Site]) -> Rows:
        """The rows of an LLM batch, read when used; `check` has opened the sites' files."""
        rows = {site: self._part(str(site), llm_batch) for site in sites}
        return Rows(rows, self.ids(llm_batch))

    def _part(self, name: str, llm_batch: int) -> Tensor:
        place = llm_batch - self.first
        return self._open[name][self._starts[place] : self._starts[place + 1]]


class Shards:
    """The shards of one key, in order; written by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[Shard] = []
        self._lock: Lock | None = None

    def read(self) -> None:
        """Look at what is there; the shards themselves are checked when they are opened."""
        self.shards = []
        for folder in self._folders():
            try:
                insort(self.shards, Shard(folder))
            except (OSError, ValueError, KeyError, TypeError):
                if self.writable:
                    console.print(f"{folder / SHARD} is damaged: the LLM makes the shard again")
                    shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> Iterator[Path]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return (self.folder / name for name in names if name.isdecimal())

    def at(self, llm_batch: int) -> Shard | None:
        """The shard that holds an LLM batch."""
        return next((s for s in self.shards if s.first <= llm_batch < s.stop), None)

    def following(self, llm_batch: int) -> int | None:
        """The first LLM batch after `llm_batch` that begins a shard."""
        return next((s.first for s in self.shards if s.first > llm_batch), None)

    def estimate(
        self, place: int, wanted: int, source: RowSource, row_bytes: int
    ) -> tuple[int, int]:
        """Bytes that the next `wanted` rows from LLM batch `place` on add to the disk, and how many
        of them are there; `row_bytes` of a row at one site."""
        needed = found = 0
        everything = len(source.sites) * row_bytes + 8  # with the id
        for shard in self.shards:
            if shard.stop > place and wanted > 0:
                hole = min(wanted, max(0, shard.first - place) * source.most)
                here = min(wanted - hole, sum(shard.rows[max(0, place - shard.first) :]))
                lacks = len(shard.lacks(source.sites))
                needed += hole * everything + here * lacks * row_bytes
                found += 0 if lacks else here
                wanted -= hole + here
                place = shard.stop
        return needed + wanted * everything, found

    def remove(self, shard: Shard) -> None:
        """Take a damaged shard out, from the disk too if this process may write."""
        self.shards.remove(shard)
        if self.writable:
            shutil.rmtree(shard.folder, ignore_errors=True)

    @property
    def writable(self) -> bool:
        """Whether this process is the one that writes."""
        return self._lock is not None

    def claim(self) -> None:
        """Become the process that writes, clear up what a killed one left, and `read`.

        BlockingIOError: another process writes. OSError: the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / ".lock")
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.read()

    def describe(self, settings: dict[str, Any]) -> None:
        """Write down, for people, what these shards are of."""
        if not (self.folder / MANIFEST).is_file():
            write_json(self.folder / MANIFEST, settings)

    def release(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None


class Lock:
    """An exclusive lock on a file until `release`, or the end of this object or process."""

    def __init__(self, path: Path) -> None:
        """BlockingIOError: somebody else holds it."""
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, number)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise


def _mapped(path: Path, size: int) -> Tensor:
    if size == 0:  # which cannot be mapped
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), size=size, dtype=torch.uint8)


def checksum(about: dict[str, Any]) -> int:
    """Of what a shard says of itself."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())
