"""Writing a shard of the activation cache (shards.py has the format)."""

import io
import json
import os
import shutil
import zlib
from bisect import insort
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lightning.files import atomically
from sae_lightning.llm.sites import Site
from sae_lightning.stream.base import Rows
from sae_lightning.stream.shards import IDS, SHARD, STATE, Shard, Shards, checksum


class Draft:
    """A shard that is being written; nothing of it is read before `commit`."""

    def __init__(
        self, store: Shards, before: dict[str, Any], sites: Iterable[Site], old: Shard | None
    ) -> None:
        """From the source's state `before`; `old`: the shard that lacks `sites` and gets them."""
        first = before["llm_batches"]
        self.store, self.before, self.sites, self.old = store, before, sites, old
        self.final = store.folder / f"{first:08d}"
        self.folder = store.folder / f".{first:08d}.tmp"
        self.folder.mkdir()
        self.rows: list[int] = []
        self.epochs: list[int] = []
        self.texts: list[int] = []
        self._about: dict[str, dict[str, Any]] = {}  # of each file

    @property
    def largest(self) -> int:
        """Bytes of its largest file."""
        return max((about["bytes"] for about in self._about.values()), default=0)

    def add(self, rows: Rows, epoch: int, text: int) -> None:
        """Append the rows of the next LLM batch; `epoch` after it, crc32 of its `text`."""
        if self.old is None:
            self._append(IDS, rows.ids)
        for site in self.sites:
            self._append(str(site), rows.activations[site])
        self.rows.append(len(rows.ids))
        self.epochs.append(epoch)
        self.texts.append(text)

    def _append(self, name: str, x: Tensor) -> None:
        dtype = str(x.dtype).removeprefix("torch.")
        fresh = {"dtype": dtype, "row": [*x.shape[1:]], "bytes": 0, "crc32": 0}
        about = self._about.setdefault(name, fresh)
        data = x.cpu().contiguous().flatten().view(torch.uint8).numpy()
        with open(self.folder / name, "ab") as file:
            file.write(data)
        about["bytes"] += data.nbytes
        about["crc32"] = zlib.crc32(data, about["crc32"])

    def commit(self, medians: dict[str, float] | None) -> None:
        """Put the shard, or the sites added to one, in place; `medians` as they are at its end.

        They are those of the first LLM batch of all: whoever goes on inside the first shard needs
        them, and cannot find them there again.
        """
        if self.old is not None:
            self._extend(self.old)
            return
        buffer = io.BytesIO()
        torch.save(self.before | {"medians": medians}, buffer)
        state = buffer.getvalue()
        (self.folder / STATE).write_bytes(state)
        self._about[STATE] = {"bytes": len(state), "crc32": zlib.crc32(state)}
        self._sync_files()
        _write_about(self.folder, self, self._about)
        os.replace(self.folder, self.final)
        _sync(self.store.folder)
        insort(self.store.shards, Shard(self.final))

    def _extend(self, old: Shard) -> None:
        self._sync_files()
        for name in self._about:
            os.replace(self.folder / name, self.final / name)
        _sync(self.final)
        files = old.files | self._about
        _write_about(self.final, old, files)
        old.files = files
        self.folder.rmdir()

    def _sync_files(self) -> None:
        for name in self._about:
            with open(self.folder / name, "rb+") as file:
                os.fsync(file.fileno())

    def discard(self) -> None:
        """Leave nothing of it behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_about(folder: Path, shard: Draft | Shard, files: dict[str, dict[str, Any]]) -> None:
    about = {"rows": shard.rows, "epochs": shard.epochs, "texts": shard.texts, "files": files}
    with atomically(folder / SHARD) as temporary:
        text = json.dumps(about | {"crc32": checksum(about)})
        temporary.write_text(text, encoding="utf8")


def _sync(folder: Path) -> None:
    """Have a renaming in `folder` outlive a power cut."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
