"""Labelled text, split into folds so that a probe cannot know the text that it is tested on.

genre            each play is in one fold
play, speaker    each text is divided:
                 | fold 0 . . . |gap| fold 1 . . . |gap| fold 2 . . . |gap| fold 3 . . . |
a data set       each document is in one fold; of documents with the same beginning, one is kept
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

MIN_PIECES_PER_FOLD = 2  # a class needs this many in each fold
MAX_CLASSES = 50


class LabelledText(NamedTuple):
    """Pieces of text, each of one class."""

    label: str
    """What the classes are: genre, play, speaker, or a column's name."""
    classes: list[str]
    class_indices: Tensor
    """[pieces] int64 class of each piece."""
    fold: Tensor
    """[pieces] int64, 0 to FOLDS - 1. Probes are tested on a fold that they were not fitted on."""
    tokens: Tensor
    """[pieces, context] int64: BOS, the piece, padding."""
    is_text: Tensor
    """[pieces, context] bool: True for tokens of the piece, False for BOS and padding."""
    notes: list[str]
    """Caveats that a reader of the scores should know."""

    def split_batches(self, n: int) -> Iterator[Sequences]:
        """All pieces in order, n at a time."""
        for indices in torch.arange(len(self.tokens)).split(n):
            yield Sequences(self.tokens[indices], self.is_text[indices], indices)


def read_labelled_text(
    config: DataConfig, label: str, tokenizer: Any, *, tokens: int, seed: int = 0
) -> LabelledText:
    """Cut about `tokens` tokens of the text of `config` into pieces of `config.context` tokens, BOS
    included; a piece of a short document is shorter.

    UserError: the text has no such label, fewer than two classes have enough pieces, or `tokens` is
    too small for two classes.
    """
    source = make_source(LLMConfig(name=NO_LLM), config, seed)
    with mute_libraries(), phase("cutting labelled text"):
        are_plays = bool(source.labels)  # only the packaged plays have fixed labels
        if not are_plays:  # first, because data without text has no `config.context`
            pieces, notes = cut_documents(source, label, seed)  # UserError if there is no text
        packing = Packing(config.context, find_bos_id(tokenizer), find_separator_id(tokenizer))
        if are_plays:
            pieces, notes = cut_plays(label, tokenizer, packing, seed)
        classes = pick_classes(label, pieces, tokens, packing.window_size)
        chosen = pick_pieces(pieces, classes, tokens // packing.window_size)
        if not are_plays:
            chosen = _cut_beginnings(chosen, tokenizer, packing)
            # again, because documents with the same beginning were dropped
            classes = pick_classes(label, chosen, tokens, packing.window_size)
            chosen = [piece for piece in chosen if piece.class_name in classes]
    classes.sort(key=make_natural_key)
    if left_out := len({piece.class_name for piece in pieces}) - len(classes):
        notes = [*notes, f"Left out: {left_out} values of {label} with fewer pieces of text."]
    windows = [piece.tokens for piece in chosen]
    for window in windows:
        check_ids(tokenizer, window, f"label={label}")
    return LabelledText(
        label=label,
        classes=classes,
        class_indices=torch.tensor([classes.index(piece.class_name) for piece in chosen]),
        fold=torch.tensor([piece.fold for piece in chosen]),
        tokens=packing.pack(windows),
        is_text=packing.mark_text(windows),
        notes=notes,
    )


def pick_classes(label: str, pieces: list[Piece], tokens: int, window_size: int) -> list[str]:
    """The most frequent classes with enough pieces in every fold: at most MAX_CLASSES, and no more
    than fit into `tokens`, at `window_size` tokens a piece. UserError if fewer than two remain."""
    counts = Counter(piece.class_name for piece in pieces)
    fold_counts = Counter((piece.class_name, piece.fold) for piece in pieces)
    frequent = [
        name
        for name, _ in counts.most_common()
        if all(fold_counts[name, fold] >= MIN_PIECES_PER_FOLD for fold in range(FOLDS))
    ]
    if len(frequent) < 2:
        common = ", ".join(f"{name} ({n})" for name, n in counts.most_common(3))
        raise UserError(
            f"label={label}: {len(counts)} values and their pieces of text: {common}"
            f"{', ...' if len(counts) > 3 else ''}; a probe needs two values with "
            f"{MIN_PIECES_PER_FOLD * FOLDS} pieces or more each"
        )
    tokens_per_class = MIN_PIECES_PER_FOLD * FOLDS * window_size
    if tokens < 2 * tokens_per_class:
        raise UserError(
            f"tokens={tokens}: too few for two classes; give {2 * tokens_per_class} or more"
        )
    return frequent[: min(MAX_CLASSES, tokens // tokens_per_class)]


def pick_pieces(pieces: list[Piece], classes: list[str], total: int) -> list[Piece]:
    """Pick about `total` pieces, evenly spaced, if possible equally many of each class and fold."""
    by_class = {name: [[] for _ in range(FOLDS)] for name in classes}
    for piece in pieces:
        if piece.class_name in by_class:
            by_class[piece.class_name][piece.fold].append(piece)
    quotas = share_out([sum(map(len, folds)) for folds in by_class.values()], total)
    chosen = []
    for folds, quota in zip(by_class.values(), quotas, strict=True):
        for fold, share in zip(folds, share_out([*map(len, folds)], quota), strict=True):
            indices = np.linspace(0, len(fold) - 1, share).round().astype(int)
            chosen += [fold[index] for index in indices]
    return chosen


def share_out(available: list[int], total: int) -> list[int]:
    """Share out `total` as evenly as possible: returns shares [len(available)], each at most the
    entry of `available`; their sum is less than `total` if there is not enough."""
    shares, left = [0] * len(available), total
    smallest_first = sorted(range(len(available)), key=lambda i: available[i])
    for done, i in enumerate(smallest_first):
        shares[i] = min(available[i], left // (len(available) - done))
        left -= shares[i]
    return shares


def _cut_beginnings(pieces: list[Piece], tokenizer: Any, packing: Packing) -> list[Piece]:
    """Tokenise the text of each piece, up to `packing.window_size` tokens; of pieces with the same
    tokens, keep only one, because two could be in different folds."""
    texts, by_tokens = [piece.text for piece in pieces], {}
    token_arrays = tokenise_documents(tokenizer, texts, packing.separator)
    for piece, tokens in zip(pieces, token_arrays, strict=True):
        window = tokens[:-1][: packing.window_size]  # without the separator
        by_tokens[window.tobytes()] = piece._replace(tokens=window)
    return [*by_tokens.values()]
