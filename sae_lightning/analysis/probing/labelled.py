"""Labelled text, split into folds so that a probe cannot cheat.

genre            each fold has its own plays
play, speaker    | fold 0 . . . |gap| fold 1 . . . |gap| fold 2 . . . |gap| fold 3 . . . |
a data set       each fold has its own documents; of those that begin alike, one is kept
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.probing.pieces import FOLDS, Piece, cut_documents, cut_plays
from sae_lightning.errors import UserError
from sae_lightning.llm.load import NO_LLM, LLMConfig
from sae_lightning.llm.quiet import mute_libraries
from sae_lightning.llm.vocabulary import check_ids, find_bos_id, find_separator_id
from sae_lightning.report.sweep_table import make_natural_key
from sae_lightning.stream import make_source
from sae_lightning.stream.flat import tokenise_documents
from sae_lightning.stream.packing import Packing, Sequences
from sae_lightning.stream.source import DataConfig
from sae_lightning.terminal import phase

MIN_PIECES_PER_FOLD = 2  # of each class
MAX_CLASSES = 50


class LabelledText(NamedTuple):
    """Pieces of text, each of one class."""

    label: str
    """What the classes are: genre, play, speaker, or a column's name."""
    classes: list[str]
    target: Tensor
    """[pieces] int64 class of each piece."""
    fold: Tensor
    """[pieces] int64, 0 to FOLDS - 1: probes are tested on a fold that they never saw."""
    tokens: Tensor
    """[pieces, context] int64: BOS, the piece, padding."""
    text: Tensor
    """[pieces, context] bool: True for tokens of the piece, False for BOS and padding."""
    notes: list[str]
    """Caveats that a reader of the scores should know."""

    def split_batches(self, n: int) -> Iterator[Sequences]:
        """All pieces in order, n at a time."""
        parts = (self.tokens, self.text, torch.arange(len(self.tokens)))
        yield from map(Sequences, *(part.split(n) for part in parts))


def labelled(
    config: DataConfig, label: str, tokenizer: Any, *, tokens: int, seed: int = 0
) -> LabelledText:
    """Cut about `tokens` tokens of the text of `config` into pieces of `config.context` tokens.

    UserError: no such label, fewer than two classes with enough pieces, too few tokens for them.
    """
    source = make_source(LLMConfig(name=NO_LLM), config, seed)
    with mute_libraries(), phase("cutting labelled text"):
        plays = bool(source.labels)
        if not plays:  # refuses data without text, which has no context
            pieces, notes = cut_documents(source, label, seed)
        packing = Packing(config.context, find_bos_id(tokenizer), find_separator_id(tokenizer))
        if plays:
            pieces, notes = cut_plays(label, tokenizer, packing, seed)
        classes = pick_classes(label, pieces, tokens, packing.window_size)
        chosen = pick_pieces(pieces, classes, tokens // packing.window_size)
        if not plays:
            chosen = _cut_beginnings(chosen, tokenizer, packing)
            classes = pick_classes(label, chosen, tokens, packing.window_size)
            chosen = [piece for piece in chosen if piece.name in classes]
    classes.sort(key=make_natural_key)
    if left_out := len({piece.name for piece in pieces}) - len(classes):
        notes = [*notes, f"Left out: {left_out} values of {label} with fewer pieces of text."]
    windows = [piece.content for piece in chosen]
    for window in windows:
        check_ids(tokenizer, window, f"label={label}")
    return LabelledText(
        label=label,
        classes=classes,
        target=torch.tensor([classes.index(piece.name) for piece in chosen]),
        fold=torch.tensor([piece.fold for piece in chosen]),
        tokens=packing.pack(windows),
        text=packing.mark_text(windows),
        notes=notes,
    )


def pick_classes(label: str, pieces: list[Piece], tokens: int, width: int) -> list[str]:
    """The most frequent classes with enough pieces of `width` tokens in every fold: at most
    MAX_CLASSES, and no more than fit into `tokens`.

    UserError if fewer than two are left.
    """
    counts = Counter(piece.name for piece in pieces)
    folds = Counter((piece.name, piece.fold) for piece in pieces)
    frequent = [
        name
        for name, _ in counts.most_common()
        if all(folds[name, fold] >= MIN_PIECES_PER_FOLD for fold in range(FOLDS))
    ]
    if len(frequent) < 2:
        common = ", ".join(f"{name} ({n})" for name, n in counts.most_common(3))
        raise UserError(
            f"label={label}: {len(counts)} values and their pieces of text: {common}"
            f"{', ...' if len(counts) > 3 else ''}; a probe needs two values with "
            f"{MIN_PIECES_PER_FOLD * FOLDS} pieces or more each"
        )
    per_class = MIN_PIECES_PER_FOLD * FOLDS * width
    if tokens < 2 * per_class:
        raise UserError(f"tokens={tokens}: too few for two classes; give {2 * per_class} or more")
    return frequent[: min(MAX_CLASSES, tokens // per_class)]


def pick_pieces(pieces: list[Piece], classes: list[str], total: int) -> list[Piece]:
    """Pick about `total` pieces, evenly spaced, if possible equally many of each class and fold."""
    by_class = {name: [[] for _ in range(FOLDS)] for name in classes}
    for piece in pieces:
        if piece.name in by_class:
            by_class[piece.name][piece.fold].append(piece)
    quotas = share_out([sum(map(len, folds)) for folds in by_class.values()], total)
    chosen = []
    for folds, quota in zip(by_class.values(), quotas, strict=True):
        for fold, share in zip(folds, share_out([*map(len, folds)], quota), strict=True):
            indices = np.linspace(0, len(fold) - 1, share).round().astype(int)
            chosen += [fold[index] for index in indices]
    return chosen


def share_out(available: list[int], total: int) -> list[int]:
    """Split `total` equally, except that no share exceeds what is `available`; the others get what
    is left."""
    shares, left = [0] * len(available), total
    for rank, i in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[i] = min(available[i], left // (len(available) - rank))
        left -= shares[i]
    return shares


def _cut_beginnings(pieces: list[Piece], tokenizer: Any, packing: Packing) -> list[Piece]:
    """Cut texts to their first tokens; of those that begin alike, keep one."""
    texts = tokenise_documents(tokenizer, [piece.content for piece in pieces], packing.separator)
    windows = [text[:-1][: packing.window_size] for text in texts]
    # different documents with equal beginnings may lie in two folds
    distinct = {window.tobytes(): n for n, window in enumerate(windows)}.values()
    return [pieces[n]._replace(content=windows[n]) for n in distinct]
