"""Labelled text in folds that share nothing by which a probe could cheat.

genre            each fold has plays of its own
play, speaker    | fold 0 . . . |gap| fold 1 . . . |gap| fold 2 . . . |gap| fold 3 . . . |
a data set       each fold has documents of its own; of two that are alike one is dropped
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.analysis.probing.labelled_documents import document_pieces
from sae_lightning.analysis.probing.labelled_plays import play_pieces
from sae_lightning.analysis.probing.pieces import Piece, affordable, choose
from sae_lightning.errors import UserError
from sae_lightning.llm.quiet import quiet
from sae_lightning.llm.vocabulary import bos_id, separator_id
from sae_lightning.stream.base import DataConfig, TextConfig
from sae_lightning.stream.flat import encode
from sae_lightning.stream.packing import Packing, Sequences
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.terminal import phase


class Labelled(NamedTuple):
    """Pieces of text, each of one class."""

    label: str
    """What the classes are: genre, play, speaker, or a column's name."""
    classes: list[str]
    """Their names."""
    target: Tensor
    """[pieces] int64 class of each piece."""
    fold: Tensor
    """[pieces] int64, 0 to FOLDS - 1: a fold is tested by probes that never saw it."""
    group: Tensor
    """[pieces] int64 number of the play, speaker or document that a piece is from."""
    tokens: Tensor
    """[pieces, context] int64: BOS, the piece, padding."""
    text: Tensor
    """[pieces, context] bool: neither BOS nor padding."""
    notes: list[str]
    """What a reader of the scores has to know, in sentences."""

    def batches(self, n: int) -> Iterator[Sequences]:
        """All pieces in order, n at a time."""
        parts = (self.tokens, self.text, torch.arange(len(self.tokens)))
        yield from map(Sequences, *(part.split(n) for part in parts))


def labelled(
    config: DataConfig, label: str, tokenizer: Any, *, tokens: int, seed: int = 0
) -> Labelled:
    """About `tokens` tokens of the text that `config` names, in pieces of `config.context` tokens.

    UserError: no such label, fewer than two classes with enough pieces, too few tokens for them.
    """
    if not isinstance(config, TextConfig):
        raise UserError(
            "data=synthetic holds no text; give data=shakespeare, data=text or data=hub"
        )
    packing = Packing(config.context, bos_id(tokenizer), separator_id(tokenizer))
    with quiet(), phase("cutting labelled text"):
        if isinstance(config, PlaysConfig):
            pieces, notes = play_pieces(label, tokenizer, packing, seed)
        else:
            pieces, notes = document_pieces(config, label, seed)
        classes = affordable(label, pieces, tokens, packing.width)
        chosen = choose(pieces, classes, tokens // packing.width)
        if isinstance(chosen[0].content, str):
            chosen = _beginnings(chosen, tokenizer, packing)
            classes = affordable(label, chosen, tokens, packing.width)
            chosen = [piece for piece in chosen if piece.name in classes]
        classes.sort(key=_natural)
        windows = [piece.content for piece in chosen]
    if left_out := len({piece.name for piece in pieces}) - len(classes):
        notes = [*notes, f"Left out: {left_out} values of {label} with fewer pieces of text."]
    return Labelled(
        label=label,
        classes=classes,
        target=torch.tensor([classes.index(piece.name) for piece in chosen]),
        fold=torch.tensor([piece.fold for piece in chosen]),
        group=torch.tensor([piece.group for piece in chosen]),
        tokens=packing.pack(windows),
        text=packing.text(windows),
        notes=notes,
    )


def _beginnings(pieces: list[Piece], tokenizer: Any, packing: Packing) -> list[Piece]:
    """Pieces with the first tokens of their texts; of those that are alike there, one."""
    texts = encode(tokenizer, [piece.content for piece in pieces], packing.separator)
    windows = [text[:-1][: packing.width] for text in texts]
    # documents that go on differently may begin alike, and lie in two folds
    distinct = {window.tobytes(): n for n, window in enumerate(windows)}.values()
    return [pieces[n]._replace(content=windows[n]) for n in distinct]


def _natural(name: str) -> tuple[bool, float, str]:
    """2 comes before 10."""
    number = name.lstrip("-").isdecimal()
    return not number, float(name) if number else 0.0, name
