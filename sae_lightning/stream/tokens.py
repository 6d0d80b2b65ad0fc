"""Opens a text as sequences of tokens for training and for evaluation (packing.py cuts them)."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.chat import ChatEncoder
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.flat import tokenise_indexed
from sae_lightning.stream.indexed_tokens import IndexedTokens
from sae_lightning.stream.mixture import mix_texts
from sae_lightning.stream.packing import HeldOutSequences, Packing, TokenStream
from sae_lightning.stream.streamed_tokens import StreamedTokens


class HeldOutTokens(HeldOutSequences):
    """Sequences of the text that only evaluation reads."""

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

    def pick_sequences(self, count: int) -> Tensor:
        """Pick sequences, the same at every call -> [<= count, context] int64.

        Indexed text: windows spread evenly over all of it, so that every document has its share.
        Streamed text: its first windows. No window is padded: a short last one is left out or, if
        it is the only one, returned as a shorter sequence."""
        if hasattr(self.data, "__len__"):
            name, separator = "held-out text", self.packing.separator
            flat = tokenise_indexed(self.data, self.tokenizer, separator, name, self.chat)
            _check_flat(self.tokenizer, flat, self.where)
            # a text shorter than a window is one short window, an empty text is none
            size = self.packing.window_size
            window_count = max(1, len(flat) // size)
            indices = np.linspace(0, window_count - 1, min(count, window_count)).round()
            starts = indices.astype(np.int64) * size
            windows = [flat.slice(start, size).to_numpy() for start in starts] if len(flat) else []
        else:
            stream = StreamedTokens(self.data, self.tokenizer, self.packing, None, self.where)
            windows = [stream.next_window() for _ in range(count)]
            windows = [window for window in windows if window is not None]
        if not windows:
            raise UserError(
                "data: no text is held out for evaluation; raise the held-out part "
                "(data.held_out, data.held_out_split or data.held_out_documents)"
            )
        full = [window for window in windows if len(window) == self.packing.window_size]
        windows = full or windows
        # cuts the padding of a single short window; otherwise there is none
        return self.packing.pack(windows)[:, : 1 + len(windows[0])]


class SplitTokens(NamedTuple):
    """The two parts of a text as tokens; the held-out one is tokenised when it is read."""

    train: TokenStream
    held_out: HeldOutSequences


def open_tokens(text: SplitDocuments, tokenizer: Any, *, context: int, seed: int) -> SplitTokens:
    """Tokenise training and held-out documents into sequences of `context` tokens.

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
        flat = tokenise_indexed(text.train, tokenizer, packing.separator, chat=chat)
        _check_flat(tokenizer, flat, text.where)
        return SplitTokens(IndexedTokens(flat, packing, seed), held_out)
    return SplitTokens(StreamedTokens(text.train, tokenizer, packing, seed, text.where), held_out)


def _check_flat(tokenizer: Any, flat: pa.ChunkedArray, where: str) -> None:
    """Raise UserError if `flat` holds an id that the LLM does not know."""
    for chunk in flat.chunks:
        check_ids(tokenizer, chunk.to_numpy(), where)
