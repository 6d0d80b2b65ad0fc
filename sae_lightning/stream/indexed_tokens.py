"""Sequences of an indexed text, whose tokens are all in one array, in a new order each epoch."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sae_lightning.errors import UserError
from sae_lightning.stream.flat import summarise_tokens
from sae_lightning.stream.packing import NO_TOKENS, Packing, Sequences, TokenStream, report_epoch
from sae_lightning.stream.states import check_text


class IndexedTokens(TokenStream):
    """Sequences of an indexed text in a seeded random order, a new one each epoch.

    windows      0  1  2  3  4  5          (slices of the flat tokens)
    epoch 1      3  0  5  1  4  2          order = PCG64(seed, 1)
    epoch 2      1  4  2  0  3  5          order = PCG64(seed, 2)
                          ^ cursor         state = (epoch, cursor)
    """

    def __init__(self, flat: pa.ChunkedArray, packing: Packing, seed: int) -> None:
        if not len(flat):
            raise UserError(NO_TOKENS)
        self.flat, self.packing, self.seed = flat, packing, seed
        self.window_count = -(-len(flat) // packing.window_size)
        self._fingerprint = ""
        self._begin(1)

    def _begin(self, epoch: int, cursor: int = 0) -> None:
        """Draw the order of `epoch` (from 1), and go to its window number `cursor` (from 0)."""
        self.epoch, self.cursor = epoch, cursor
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self._order = random.permutation(self.window_count)

    @property
    def served(self) -> int:
        """The number of sequences served so far."""
        return (self.epoch - 1) * self.window_count + self.cursor

    def next(self, n: int) -> Sequences:
        """Serve the next n sequences [n, context], beginning a new epoch where one ends."""
        windows, sequence_ids = [], []
        while len(windows) < n:
            if self.cursor == self.window_count:
                report_epoch(f"the text ran out after {len(self.flat):,} tokens", self.epoch + 1)
                self._begin(self.epoch + 1)
            start = self._order[self.cursor] * self.packing.window_size
            windows.append(self.flat.slice(start, self.packing.window_size).to_numpy())
            sequence_ids.append(self.served)
            self.cursor += 1
        return self.packing.pack_sequences(windows, torch.tensor(sequence_ids, dtype=torch.int64))

    def reopen(self) -> "IndexedTokens":
        return IndexedTokens(self.flat, self.packing, self.seed)

    def fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = summarise_tokens(self.flat)
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "cursor": self.cursor, "tokens": len(self.flat)}
        return position | {"text": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last sequence served; UserError if the text is a different one."""
        if state["tokens"] != len(self.flat):
            raise UserError(
                f"data: the text has {len(self.flat):,} tokens but the run to be resumed read one "
                f"of {state['tokens']:,}; resume with the same data settings and files, and the "
                "version of sae_lightning that it was begun with"
            )
        check_text(state, self.fingerprint())
        self._begin(state["epoch"], state["cursor"])
