"""Packs documents into sequences of `context` tokens.

    documents      To be, or not to be      Who's there?      Nay, answer me
                   └────────┬─────────┘     └────┬─────┘      └─────┬──────┘
    token stream   a  b  c  d  e  f  /  g  h  i  /  j  k  l  m  /              / = separator
                   └──┬──┘  └──┬──┘  └──┬──┘  └──┬──┘  └──┬──┘  └┬┘
    sequences      ^  a  b  c                                                  ^ = BOS
    (context 4)    ^  d  e  f
                   ^  /  g  h
                   ^  i  /  j
                   ^  k  l  m
                   ^  /  /  /      only the last one of an epoch is padded, with separators

Every token of a document, and one separator after the document, is in exactly one sequence. A
document without tokens adds nothing, not even a separator. Tokens that the LLM reads but that are
not trained on are the complements ~id in a window (see `ChatEncoder`).
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sae_lightning.terminal import console

NO_TOKENS = (
    "data: the text holds no token to train on; check the files and the column, "
    "and that the held-out part leaves something"
)


class Sequences(NamedTuple):
    """Packed sequences, in the order in which the LLM reads them."""

    tokens: Tensor
    """[n, context] int64; column 0 is BOS."""

    is_text: Tensor
    """[n, context] bool; false for BOS in column 0, padding, and tokens that are not trained on."""

    sequence_ids: Tensor
    """[n] int64; unique within the run."""

    def mark_kept(self, dropped_ids: Tensor) -> Tensor:
        """Mark where `is_text` holds and the id is not in `dropped_ids` -> [n, context] bool."""
        return self.is_text & ~torch.isin(self.tokens, dropped_ids)


class Packing(NamedTuple):
    """How a flat array of tokens becomes sequences."""

    context: int
    """Tokens per sequence, BOS included."""

    bos: int
    """Id that opens every sequence."""

    separator: int
    """Id after every document, and in the padding of an epoch's last sequence."""

    @property
    def window_size(self) -> int:
        """Tokens of text in a sequence."""
        return self.context - 1

    def pack(self, windows: list[np.ndarray]) -> Tensor:
        """Put BOS before each window of at most `window_size` tokens -> [n, context] int64."""
        tokens = np.full((len(windows), self.context), self.separator, dtype=np.int64)
        tokens[:, 0] = self.bos
        for i, window in enumerate(windows):
            tokens[i, 1 : 1 + len(window)] = window
        return torch.from_numpy(tokens)

    def mark_text(self, windows: list[np.ndarray]) -> Tensor:
        """Mark where `pack` puts the tokens of the windows -> [n, context] bool."""
        stops = torch.tensor([1 + len(window) for window in windows])
        positions = torch.arange(self.context)
        return (positions > 0) & (positions < stops[:, None])

    def pack_sequences(self, windows: list[np.ndarray], sequence_ids: Tensor) -> Sequences:
        """Pack windows into `Sequences`. A token that is not trained on comes as its complement."""
        tokens = self.pack(windows)
        return Sequences(read_ids(tokens), self.mark_text(windows) & (tokens >= 0), sequence_ids)


class HeldOutSequences(Protocol):
    """Held-out sequences, the same at every call."""

    packing: Packing

    def pick_sequences(self, count: int) -> Tensor:
        """Pick sequences -> [about `count`, <= context] int64; tokens that are not trained on
        are complements (see `read_ids`). UserError: nothing is held out."""


def read_ids(tokens: Tensor) -> Tensor:
    """Undo the complements of tokens that are not trained on."""
    return torch.maximum(tokens, ~tokens)  # ~id = -1 - id is negative


class TokenStream(Protocol):
    """An endless stream of packed sequences whose position can be saved."""

    epoch: int
    """The current epoch, from 1; an epoch is one reading of the whole text."""

    packing: Packing

    def next(self, n: int) -> Sequences:
        """Serve the next n sequences."""

    def reopen(self) -> "TokenStream":
        """Return a stream of the same sequences from their beginning, with its own position."""

    def fingerprint(self) -> str:
        """Return a string that identifies the text, the same in every process."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def report_epoch(reason: str, epoch: int) -> None:
    """Print the `reason` (the data ran out), and that `epoch` begins."""
    console.print(f"{reason}; going round again in a new order (epoch {epoch})")
