"""The activation cache on disk: one folder a key, in it one safetensors file a shard.

0f3c5a.../
    manifest.json                the settings that the key was made from, for people
    .lock                        held by the process that writes
    00000000.safetensors         the shard that begins with LLM batch 0
    00000112.safetensors         the next one
    .00000224.safetensors.*.tmp  folder of one that is being written, or whose writer was killed

In a shard:
    ids         [rows] int64, the sequence of each row
    resid.9     [rows, d] for each site, in the LLM's dtype
    carry       tensors of the state of a streamed text
    metadata    about: JSON; rows, epoch and crc32 of the tokens of each LLM batch, and where LLM
                and text were at the shard's beginning. crc32: of `about` and all tensors

A shard appears by one renaming when all of it is on disk. There is no list of shards that a crash
could leave behind the truth, and no shard needs another one: one that is damaged, or was never
finished, is made again alone.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lightning.files import write_atomically
from sae_lightning.llm.sites import Site
from sae_lightning.stream.source import Rows
from sae_lightning.stream.states import (
    ANY_COUNT,
    expect,
    expect_activations,
    expect_ids,
    expect_rows,
)

SHARD_SUFFIX = ".safetensors"
DAMAGE_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)


class Shard:
    """Consecutive LLM batches `first` to `stop` - 1."""

    def __init__(self, path: Path) -> None:
        """Read the metadata; one of `DAMAGE_ERRORS` where they cannot be read."""
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no plain file")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        self.path, self.first = path, int(path.stem)
        self._about, self._crc32 = metadata["about"], metadata["crc32"]
        about = json.loads(self._about)
        state = {"tokens": dict, "llm_batches": self.first}
        expect(about, {"rows": list, "epochs": list, "texts": list, "state": state}, "about")
        for name, counts in (
            ("rows", range(2**31)),
            ("epochs", ANY_COUNT),
            ("texts", range(2**32)),
        ):
            expect(len(about[name]), len(about["rows"]), name)
            for each in about[name]:
                expect(each, counts, name)
        self.rows: list[int] = about["rows"]  # of each LLM batch
        self.epochs: list[int] = about["epochs"]  # after each LLM batch
        self.texts: list[int] = about["texts"]  # crc32 of the tokens of each LLM batch
        self._state: dict[str, Any] = about["state"]
        self.stop = self.first + len(self.rows)
        self._starts = np.cumsum([0, *self.rows])
        self._tensors: dict[str, Tensor] = {}

    def open(self, sites: Sequence[Site], width: int, **packing: int) -> bool:
        """Map the file; False where it is not as it was written, or holds something else than what
        an LLM with activations of this `width` and text in this `packing` (see `expect_rows`)
        give."""
        try:
            self._tensors = load_file(self.path)
            if _checksum(self._about, self._tensors) != self._crc32:
                raise ValueError("its checksum is wrong")
            rows = int(self._starts[-1])
            expect_activations(self._tensors, sites, rows, width, "rows")
            expect_ids(self._tensors["ids"], rows, self.stop * packing["batch"], "ids")
            expect_rows(self.state(), sites, **packing)
        except DAMAGE_ERRORS:
            self.close()
        return bool(self._tensors)

    def close(self) -> None:
        """Unmap the file."""
        self._tensors = {}

    def state(self) -> dict[str, Any]:
        """The source's state before the first LLM batch of an opened shard."""
        tokens, there = self._state["tokens"], self._tensors
        tensors = {name: there[name].clone() for name in tokens.keys() & there.keys()}
        return self._state | {"tokens": tokens | tensors}

    def batch(self, llm_batch: int, sites: Iterable[Site]) -> Rows:
        """The rows of an LLM batch of an opened shard, read when used."""
        place = llm_batch - self.first
        here = slice(self._starts[place], self._starts[place + 1])
        rows = {site: self._tensors[str(site)][here] for site in sites}
        return Rows(rows, self._tensors["ids"][here])


def write_shard(
    folder: Path, state: dict[str, Any], rows: list[Rows], epochs: list[int], texts: list[int]
) -> Shard:
    """Write LLM batches, on the CPU; `state` of the source before them, epochs after each of them,
    and crc32 of their tokens."""
    tensors = {"ids": torch.cat([each.ids for each in rows])}
    for site in rows[0].activations:
        tensors[str(site)] = torch.cat([each.activations[site] for each in rows])
    tensors |= {name: x for name, x in state["tokens"].items() if isinstance(x, Tensor)}
    about = {"rows": [len(each.ids) for each in rows], "epochs": epochs, "texts": texts}
    told = json.dumps(about | {"state": state}, default=lambda tensor: None)
    path = folder / f"{state['llm_batches']:08d}{SHARD_SUFFIX}"
    with write_atomically(path) as temporary:
        save_file(tensors, temporary, {"about": told, "crc32": _checksum(told, tensors)})
    return Shard(path)


def _checksum(about: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(about.encode())
    for name, x in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), crc)
        if x.numel():  # torch refuses to look at no numbers as bytes
            crc = zlib.crc32(x.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
