"""Packed sequences of tokens in a seeded order, with exact resume (packing.py cuts them).

The two kinds of `TokenStream`:

    ShuffledTokens   indexed text: all sequences of an epoch in random order
    StreamedTokens   streamed text: documents shuffled through a buffer, then cut into sequences
"""

import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.chat import ChatEncoder
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id
from sae_lightning.stream.documents import SplitText, summarise_cause
from sae_lightning.stream.flat import flat_tokens, summarise_tokens, tokenise_documents
from sae_lightning.stream.mixture import mix_texts
from sae_lightning.stream.packing import HeldOutStream, Packing, Sequences, TokenStream
from sae_lightning.stream.states import check_text
from sae_lightning.terminal import console

SHUFFLE_BUFFER = 1000  # documents
STREAMED_CHARACTERS = 1 << 16  # characters tokenised at a time when streaming


class ShuffledTokens(TokenStream):
    """Sequences of an indexed text in a seeded random order, a new one each epoch.

    windows      0  1  2  3  4  5          (slices of the flat tokens)
    epoch 1      3  0  5  1  4  2          order = PCG64(seed, 1)
    epoch 2      1  4  2  0  3  5          order = PCG64(seed, 2)
                          ^ cursor         state = (epoch, cursor)
    """

    def __init__(self, flat: pa.ChunkedArray, packing: Packing, seed: int) -> None:
        if not len(flat):
            raise UserError(_NO_TOKENS)
        self.flat, self.packing, self.seed = flat, packing, seed
        self.windows = -(-len(flat) // packing.width)
        self._fingerprint = ""
        self._begin(1)

    def _begin(self, epoch: int, cursor: int = 0) -> None:
        self.epoch, self.cursor = epoch, cursor
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self._order = random.permutation(self.windows)

    @property
    def served(self) -> int:
        return (self.epoch - 1) * self.windows + self.cursor

    def next(self, n: int) -> Sequences:
        """Serve the next n sequences [n, context], beginning a new epoch where one ends."""
        windows, ids = [], []
        while len(windows) < n:
            if self.cursor == self.windows:
                _say_again(len(self.flat), self.epoch + 1)
                self._begin(self.epoch + 1)
            start = self._order[self.cursor] * self.packing.width
            windows.append(self.flat.slice(start, self.packing.width).to_numpy())
            ids.append(self.served)
            self.cursor += 1
        return self.packing.pack_sequences(windows, torch.tensor(ids, dtype=torch.int64))

    def reopen(self) -> "ShuffledTokens":
        return ShuffledTokens(self.flat, self.packing, self.seed)

    def fingerprint(self) -> str:
        """What identifies the text (see `summarise_tokens`)."""
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


class StreamedTokens(TokenStream):
    """Sequences of a streamed text, its documents shuffled through a buffer, anew each epoch.

    documents --shuffle(seed, epoch)--> | d7 | d2 | d9 | ...     counted as they are tokenised
                                              ^ documents
    carry     tokens not served yet     [ . . . . . . . . ]      next window = its first tokens

    state = (epoch, documents, their crc32, carry). Resuming shuffles with the same seed and reads
    that many documents again, which is exact and verifies them. The state_dict of datasets is
    faster but drops the documents in the shuffle buffer: a resumed run would never read them.
    """

    def __init__(
        self, data: Any, tokenizer: Any, packing: Packing, seed: int | None, where: str = "data"
    ) -> None:
        """`seed` None keeps the documents in their own order; `where` names the text."""
        self.data, self.tokenizer, self.packing, self.seed = data, tokenizer, packing, seed
        self.where, self._fingerprint = where, ""
        self.served = 0
        self._begin(1)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.documents, self.read, self.documents_crc32 = epoch, 0, 0, 0
        self.carry = np.empty(0, dtype=np.int32)
        data = self.data
        if self.seed is not None:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            data = data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._rows = iter(data)

    def _texts(self) -> Iterator[str]:
        """Yield the documents that follow, and count them."""
        try:
            for row in self._rows:
                text = "" if row["text"] is None else row["text"]
                self.documents += 1
                if not isinstance(text, str):
                    raise UserError(
                        f"{self.where}: a row holds {type(text).__name__} in place of text "
                        f"({str(text)[:40]!r}); leave it out, or give another data.column"
                    )
                self.documents_crc32 = zlib.crc32(
                    text.encode("utf8", "surrogatepass"), self.documents_crc32
                )
                yield text
        except UserError:
            raise
        except Exception as error:  # the network or a broken file; errors of a dozen libraries
            raise UserError(
                f"{self.where}: reading it broke off ({summarise_cause(error)}); what a run "
                "trained up to its last checkpoint is kept: continue it with resume=<run folder>"
            ) from error

    def _pull(self) -> bool:
        """Tokenise some more documents into the carry; False at the end of the epoch."""
        texts, characters = [], 0
        for text in self._texts():
            texts.append(text)
            characters += len(text)
            if characters >= STREAMED_CHARACTERS:
                break
        if not texts:
            return False
        new = tokenise_documents(self.tokenizer, texts, self.packing.separator)
        self.carry = np.concatenate([self.carry, *new])
        check_ids(self.tokenizer, self.carry, self.where)
        self.read += sum(map(len, new))
        return True

    def window(self) -> np.ndarray | None:
        """The next window [<= width] of this epoch; the last may be short; None at its end."""
        while len(self.carry) < self.packing.width and self._pull():
            pass
        if not len(self.carry):
            return None
        window, self.carry = np.split(self.carry, [self.packing.width])
        return window

    def next(self, n: int) -> Sequences:
        """Serve the next n sequences [n, context], beginning a new epoch where one ends."""
        windows = []
        while len(windows) < n:
            window = self.window()
            if window is not None:
                windows.append(window)
                continue
            if not self.read:
                raise UserError(_NO_TOKENS)
            _say_again(self.read, self.epoch + 1)
            self._begin(self.epoch + 1)
        self.served += n
        return self.packing.pack_sequences(windows, torch.arange(self.served - n, self.served))

    def reopen(self) -> "StreamedTokens":
        return StreamedTokens(self.data, self.tokenizer, self.packing, self.seed, self.where)

    def fingerprint(self) -> str:
        """Length and checksum of the first documents: the rest of a streamed text is not read."""
        if not self._fingerprint:
            start = StreamedTokens(self.data, self.tokenizer, self.packing, None, self.where)
            start._pull()
            checksum = zlib.crc32(start.carry)
            self._fingerprint = f"begins with {len(start.carry)} tokens, crc32 {checksum:08x}"
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "documents": self.documents,
            "text": self.documents_crc32,
            "read": self.read,
            "served": self.served,
            "carry": torch.from_numpy(self.carry.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last sequence served; UserError if the text is a different one."""
        self._begin(state["epoch"])
        deque(islice(self._texts(), state["documents"]), maxlen=0)
        check_text(state, self.documents_crc32)
        self.read, self.served = state["read"], state["served"]
        self.carry = state["carry"].numpy().copy()


class HeldOutTokens(HeldOutStream):
    """The text that only evaluation reads, as sequences."""

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        packing: Packing,
        where: str = "data",
        chat: ChatEncoder | None = None,
    ) -> None:
        """`where` names the text in messages; `chat` encodes conversations."""
        self.data, self.tokenizer, self.packing, self.where = data, tokenizer, packing, where
        self.chat = chat

    def pick_sequences(self, sequences: int) -> Tensor:
        """Pick sequences, the same at every call -> [<= sequences, context] int64.

        Indexed text: windows spread evenly over all of it, so that every document has its share.
        Streamed text: its first windows. No window is padded: a short last one is left out or, if
        it is the only one, returned as a shorter sequence.
        """
        if hasattr(self.data, "__len__"):
            separator = self.packing.separator
            flat = flat_tokens(self.data, self.tokenizer, separator, "held-out text", self.chat)
            _check(self.tokenizer, flat, self.where)
            width, count = self.packing.width, max(1, len(flat) // self.packing.width)
            chosen = np.linspace(0, count - 1, min(sequences, count)).round().astype(np.int64)
            windows = [flat.slice(n * width, width).to_numpy() for n in chosen if len(flat)]
        else:
            stream = StreamedTokens(self.data, self.tokenizer, self.packing, None, self.where)
            windows = [w for _ in range(sequences) if (w := stream.window()) is not None]
        if not windows:
            raise UserError(
                "data: no text is held out for evaluation; raise the held-out part "
                "(data.held_out, data.held_out_split or data.held_out_documents)"
            )
        full = [window for window in windows if len(window) == self.packing.width]
        return self.packing.pack(full or windows)[:, : 1 + len((full or windows)[0])]


class SplitTokens(NamedTuple):
    """The two parts of a text as tokens; the held-out one is tokenised when it is read."""

    train: TokenStream
    held_out: HeldOutStream


def open_tokens(text: SplitText, tokenizer: Any, *, context: int, seed: int) -> SplitTokens:
    """Tokenise an opened `SplitText` into training and held-out sequences of `context` tokens.

    An indexed training text is tokenised right away, a streamed one as it is read.
    UserError: the text holds no token, or one that the LLM does not know.
    """
    if text.others:
        texts = (text._replace(others=()), *text.others)
        opened = [open_tokens(part, tokenizer, context=context, seed=seed) for part in texts]
        return SplitTokens(*mix_texts(opened, [part.weight for part in texts]))
    packing = Packing(context, find_bos_id(tokenizer), find_separator_id(tokenizer))
    is_chat = text.assistant_only is not None
    chat = ChatEncoder(tokenizer, text.assistant_only) if is_chat else None
    held_out = HeldOutTokens(text.held_out, tokenizer, packing, text.where, chat)
    if hasattr(text.train, "__len__"):
        flat = flat_tokens(text.train, tokenizer, packing.separator, chat=chat)
        _check(tokenizer, flat, text.where)
        return SplitTokens(ShuffledTokens(flat, packing, seed), held_out)
    return SplitTokens(StreamedTokens(text.train, tokenizer, packing, seed, text.where), held_out)


def _check(tokenizer: Any, flat: pa.ChunkedArray, where: str) -> None:
    for chunk in flat.chunks:
        check_ids(tokenizer, chunk.to_numpy(), where)


_NO_TOKENS = (
    "data: the text holds no token to train on; check the files and the column, "
    "and that the held-out part leaves something"
)


def _say_again(tokens: int, epoch: int) -> None:
    console.print(
        f"the text ran out after {tokens:,} tokens; "
        f"going round again in a new order (epoch {epoch})"
    )
