"""The activation cache on disk: a folder per key, a safetensors file per shard.

0f3c5a.../
    manifest.json                what the key is a hash of, for people
    .lock                        held by the process that writes
    00000000.safetensors         the shard that begins with LLM batch 0
    00000112.safetensors         the next one
    .00000224.safetensors.*.tmp  folder of a shard being written, or left by a killed writer

In a shard:
    ids         [rows] int64, the sequence of each row
    resid.9     [rows, d] for each site, in the LLM's dtype
    carry       the tensor in a streamed text's state: tokens not served yet
    metadata    about (JSON): for each LLM batch the number of rows, the epoch after it and the
                crc32 of its tokens; the row stream's state before the shard
                crc32: of `about` and all tensors

A shard is renamed into place once it is complete. No file lists the shards, and each can be read
without the others: after a crash, only damaged or unfinished shards are computed again.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lightning.files import LOCK_FILE, hold_lock, remove_leftovers, write_atomically
from sae_lightning.llm.sites import Site
from sae_lightning.stream.source import Rows
from sae_lightning.stream.states import (
    ANY_COUNT,
    expect,
    expect_activations,
    expect_ids,
    expect_rows,
)
from sae_lightning.terminal import console

SHARD_SUFFIX = ".safetensors"
DAMAGE_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError)


class Shard:
    """One file of the cache: LLM batches `first` to `stop` - 1."""

    def __init__(self, path: Path) -> None:
        """Read the metadata. Raises one of `DAMAGE_ERRORS` if it is damaged."""
        if not path.is_file():  # opening a pipe would block
            raise ValueError("it is not a regular file")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        self.path, self.first = path, int(path.stem)
        self._header, self._crc32 = metadata["about"], metadata["crc32"]
        about = json.loads(self._header)
        state = {"tokens": dict, "llm_batches": self.first}  # the expected type, the expected value
        expect(about, {"rows": list, "epochs": list, "texts": list, "state": state}, "about")
        allowed = {"rows": range(2**31), "epochs": ANY_COUNT, "texts": range(2**32)}
        for name, numbers in allowed.items():
            expect(len(about[name]), len(about["rows"]), name)
            for number in about[name]:
                expect(number, numbers, name)
        self.row_counts: list[int] = about["rows"]  # of each LLM batch
        self.epochs: list[int] = about["epochs"]  # after each LLM batch
        self.tokens_crc32: list[int] = about["texts"]  # of each LLM batch
        self._state: dict[str, Any] = about["state"]
        self.stop = self.first + len(self.row_counts)
        # the first row of each LLM batch and, last, the number of rows
        self._starts = np.cumsum([0, *self.row_counts])
        self._tensors: dict[str, Tensor] = {}

    def map_tensors(
        self, sites: Sequence[Site], width: int, *, batch: int, context: int, vocabulary: int
    ) -> bool:
        """Mmap the tensors; returns False if the checksum is wrong, or if they do not fit an LLM of
        this `width` and `vocabulary`, or batches of `batch` sequences of `context` tokens."""
        try:
            self._tensors = load_file(self.path)
            if _compute_checksum(self._header, self._tensors) != self._crc32:
                raise ValueError("its checksum is wrong")
            rows = int(self._starts[-1])
            expect_activations(self._tensors, dict.fromkeys(sites, width), rows, "rows")
            expect_ids(self._tensors["ids"], rows, self.stop * batch, "ids")
            state = self.read_state()
            expect_rows(state, sites, batch=batch, context=context, vocabulary=vocabulary)
        except DAMAGE_ERRORS:
            self.close()
        return bool(self._tensors)

    def close(self) -> None:
        """Drop the mmap of the tensors."""
        self._tensors = {}

    def read_state(self) -> dict[str, Any]:
        """Return the state of the row stream before the first LLM batch of a mapped shard."""
        tokens = self._state["tokens"]  # with null in place of tensors
        names = tokens.keys() & self._tensors.keys()
        tensors = {name: self._tensors[name].clone() for name in names}
        return self._state | {"tokens": tokens | tensors}

    def read_batch(self, llm_batch: int, sites: Iterable[Site]) -> Rows:
        """Return the rows of an LLM batch of a mapped shard; they are read from disk when used."""
        index = llm_batch - self.first
        start, stop = self._starts[index], self._starts[index + 1]
        activations = {site: self._tensors[str(site)][start:stop] for site in sites}
        return Rows(activations, self._tensors["ids"][start:stop])


def write_shard(folder: Path, state: dict[str, Any], buffer: list[tuple[Rows, int, int]]) -> Shard:
    """Write LLM batches. `buffer`: the rows of each (on the CPU), the epoch after it, and the crc32
    of its tokens. `state`: that of the row stream before the first LLM batch."""
    batches, epochs, crc32s = zip(*buffer, strict=True)
    tensors = {"ids": torch.cat([batch.sequence_ids for batch in batches])}
    for site in batches[0].activations:
        tensors[str(site)] = torch.cat([batch.activations[site] for batch in batches])
    tensors |= {name: x for name, x in state["tokens"].items() if isinstance(x, Tensor)}
    row_counts = [len(batch.sequence_ids) for batch in batches]
    about = {"rows": row_counts, "epochs": epochs, "texts": crc32s}
    # the state's tensors are saved among `tensors`: the header has null in their place
    header = json.dumps(about | {"state": state}, default=lambda tensor: None)
    path = folder / f"{state['llm_batches']:08d}{SHARD_SUFFIX}"
    metadata = {"about": header, "crc32": _compute_checksum(header, tensors)}
    with write_atomically(path) as temporary:
        save_file(tensors, temporary, metadata)
    return Shard(path)


def _compute_checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32, in hex, of `header` and of the names, dtypes, shapes and bytes of the tensors."""
    crc = zlib.crc32(header.encode())
    for name, x in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), crc)
        if x.numel():  # torch cannot view an empty tensor as bytes
            crc = zlib.crc32(x.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def count_cached(shards: list[Shard], llm_batch: int, max_rows: int, remaining: int) -> int:
    """Count how many of the next `remaining` rows, from `llm_batch` on, are in `shards` (in order).
    Each LLM batch that is in no shard is assumed to have `max_rows` rows."""
    cached, left = 0, remaining
    for shard in shards:
        if shard.stop > llm_batch:
            uncached_batches = max(0, shard.first - llm_batch)  # before this shard
            left -= min(left, uncached_batches * max_rows)
            passed_batches = max(0, llm_batch - shard.first)  # of this shard
            in_shard = min(left, sum(shard.row_counts[passed_batches:]))
            cached += in_shard
            left -= in_shard
            llm_batch = shard.stop
    return cached


def lock_folder(folder: Path, lock: ExitStack) -> bool:
    """Lock the folder of a cache until `lock` is closed, and remove leftovers; returns False if
    another process has locked it. OSError if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock.enter_context(hold_lock(folder / LOCK_FILE)):
            console.print(
                f"the file system of {folder} has no locks: nothing keeps another process from "
                "writing the same activation cache"
            )
        remove_leftovers(folder)
    except BlockingIOError:
        console.print(
            f"another process writes the activation cache in {folder}: this run reads what is "
            "complete there and runs the LLM for the rest"
        )
        return False
    return True
