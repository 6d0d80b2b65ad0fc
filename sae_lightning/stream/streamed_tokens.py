"""Sequences of a streamed text, whose documents are tokenised as they are read."""

import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.vocabulary import check_ids
from sae_lightning.stream.documents import summarise_cause
from sae_lightning.stream.flat import tokenise_documents
from sae_lightning.stream.packing import NO_TOKENS, Packing, Sequences, TokenStream, report_epoch
from sae_lightning.stream.states import check_text

SHUFFLE_BUFFER = 1000  # documents held, of which a random one comes next
STREAMED_CHARACTERS = 1 << 16  # characters tokenised at a time


class StreamedTokens(TokenStream):
    """Sequences of a streamed text, its documents shuffled through a buffer, anew each epoch.

    documents --shuffle(seed, epoch)--> | d7 | d2 | d9 | ...
                                              ^ documents_read
    carry     tokens not served yet     [ . . . . . . . . ]      next window = its first tokens

    Resuming shuffles with the same seed and reads `documents_read` documents again, which is exact
    and verifies their crc32. The state_dict of datasets is faster, but drops the documents in the
    shuffle buffer.
    """

    def __init__(
        self, data: Any, tokenizer: Any, packing: Packing, seed: int | None, where: str = "data"
    ) -> None:
        """`seed` None keeps the documents in their order; `where` names the text in messages."""
        self.data, self.tokenizer, self.packing, self.seed = data, tokenizer, packing, seed
        self.where, self._fingerprint = where, ""
        self.served = 0
        self._begin(1)

    def _begin(self, epoch: int) -> None:
        """Go to the first document of `epoch` (from 1), in its order."""
        self.epoch, self.documents_read, self.tokens_read, self.documents_crc32 = epoch, 0, 0, 0
        self.carry = np.empty(0, dtype=np.int32)
        data = self.data
        if self.seed is not None:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            data = data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._documents = iter(data)

    def _read_texts(self) -> Iterator[str]:
        """Yield the documents that follow in this epoch, and count them."""
        try:
            for row in self._documents:
                text = "" if row["text"] is None else row["text"]
                self.documents_read += 1
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

    def _tokenise_more(self) -> bool:
        """Append the tokens of some more documents to the carry; False at the end of the epoch."""
        texts, characters = [], 0
        for text in self._read_texts():
            texts.append(text)
            characters += len(text)
            if characters >= STREAMED_CHARACTERS:
                break
        if not texts:
            return False
        documents = tokenise_documents(self.tokenizer, texts, self.packing.separator)
        self.carry = np.concatenate([self.carry, *documents])
        check_ids(self.tokenizer, self.carry, self.where)
        self.tokens_read += sum(map(len, documents))
        return True

    def next_window(self) -> np.ndarray | None:
        """The epoch's next window [<= window_size]; None after the last one, which may be short."""
        while len(self.carry) < self.packing.window_size and self._tokenise_more():
            pass
        if not len(self.carry):
            return None
        window, self.carry = np.split(self.carry, [self.packing.window_size])
        return window

    def next(self, n: int) -> Sequences:
        """Serve the next n sequences [n, context], beginning a new epoch where one ends."""
        windows = []
        while len(windows) < n:
            window = self.next_window()
            if window is not None:
                windows.append(window)
                continue
            if not self.tokens_read:
                raise UserError(NO_TOKENS)
            report_epoch(f"the text ran out after {self.tokens_read:,} tokens", self.epoch + 1)
            self._begin(self.epoch + 1)
        self.served += n
        return self.packing.pack_sequences(windows, torch.arange(self.served - n, self.served))

    def reopen(self) -> "StreamedTokens":
        return StreamedTokens(self.data, self.tokenizer, self.packing, self.seed, self.where)

    def fingerprint(self) -> str:
        """Number and checksum of the first documents' tokens: the rest of the text is not read."""
        if not self._fingerprint:
            stream = StreamedTokens(self.data, self.tokenizer, self.packing, None, self.where)
            stream._tokenise_more()
            checksum = zlib.crc32(stream.carry)
            self._fingerprint = f"begins with {len(stream.carry)} tokens, crc32 {checksum:08x}"
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "documents": self.documents_read,
            "text": self.documents_crc32,
            "read": self.tokens_read,
            "served": self.served,
            "carry": torch.from_numpy(self.carry.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last sequence served; UserError if the text is a different one."""
        self._begin(state["epoch"])
        # documents read before are read again and dropped; this also computes their checksum
        deque(islice(self._read_texts(), state["documents"]), maxlen=0)
        check_text(state, self.documents_crc32)
        self.tokens_read, self.served = state["read"], state["served"]
        self.carry = state["carry"].numpy().copy()
