"""Mixtures of texts (data.weights): sequences of several texts, interleaved by their weights.

    weights      books 0.75, code 0.25
    sequences    b1  b2  c1  b3  b4  b5  c2  b6  b7  ...    next: the text furthest behind its share

At every point of the stream, each text has had its share of the tokens, to within a few sequences.
Each text has separate epochs: a small text with a large weight is repeated sooner.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.stream.packing import HeldOutSequences, Sequences, TokenStream


class MixedTokens(TokenStream):
    """Interleaves the sequences of several indexed texts; its state is the states of the texts."""

    def __init__(self, texts: Sequence[Any], weights: Sequence[float]) -> None:
        """`texts`: an `IndexedTokens` for each of the weights, which add up to 1."""
        self.texts, self.weights, self.packing = texts, weights, texts[0].packing

    @property
    def epoch(self) -> int:
        """The epoch of the text that has been read least often."""
        return min(text.epoch for text in self.texts)

    def next(self, n: int) -> Sequences:
        """Serve the next n sequences, each from the text that is furthest behind its share."""
        counts = [text.served for text in self.texts]
        first, parts = sum(counts), []
        for total in range(first + 1, first + n + 1):
            shares = [weight * total for weight in self.weights]
            lags = [share - count for share, count in zip(shares, counts, strict=True)]
            index = lags.index(max(lags))
            counts[index] += 1
            parts.append(self.texts[index].next(1))
        tokens = torch.cat([part.tokens for part in parts])
        is_text = torch.cat([part.is_text for part in parts])
        return Sequences(tokens, is_text, torch.arange(first, first + n))

    def reopen(self) -> "MixedTokens":
        return MixedTokens([text.reopen() for text in self.texts], self.weights)

    def fingerprint(self) -> str:
        """The fingerprints of all texts."""
        return "; ".join(text.fingerprint() for text in self.texts)

    def state_dict(self) -> dict[str, Any]:
        return {"texts": [text.state_dict() for text in self.texts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last sequence served; UserError if a text is a different one."""
        for text, text_state in zip(self.texts, state["texts"], strict=True):
            text.load_state_dict(text_state)


class MixedHeldOut(HeldOutSequences):
    """The held-out parts of several texts, by the same weights."""

    def __init__(self, texts: Sequence[Any], weights: Sequence[float]) -> None:
        """`texts`: a `HeldOutTokens` for each of the weights."""
        self.texts, self.weights, self.packing = texts, weights, texts[0].packing

    def pick_sequences(self, count: int) -> Tensor:
        """Pick sequences of each text by its weight, at least one -> [about `count`, context]."""
        parts = []
        for text, weight in zip(self.texts, self.weights, strict=True):
            part = text.pick_sequences(max(1, round(weight * count)))
            if part.shape[1] < self.packing.context:
                raise UserError(
                    f"data.weights: {text.where} holds out less than a sequence of "
                    f"data.context={self.packing.context}; raise data.held_out, or lower "
                    "data.context"
                )
            parts.append(part)
        return torch.cat(parts)


def mix_texts(
    texts: Sequence[tuple[Any, Any]], weights: Sequence[float]
) -> tuple[MixedTokens, MixedHeldOut]:
    """Mix texts, each a `SplitTokens`, by `weights`, which add up to 1."""
    train, held_out = zip(*texts, strict=True)
    return MixedTokens(train, weights), MixedHeldOut(held_out, weights)
