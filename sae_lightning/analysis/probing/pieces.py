"""Pieces of labelled text, and which of them a probe is fitted and tested on.

Classes, and the folds of a class, get equally many pieces, as far as they have any.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from sae_lightning.errors import UserError

FOLDS = 4
LEAST = 2  # pieces of a class in a fold
MOST = 50  # classes


class Piece(NamedTuple):
    """A piece of text of one class."""

    name: str
    """Its class."""
    fold: int
    """0 to FOLDS - 1: a fold is tested by probes that never saw it."""
    group: int
    """Number of the play, speaker or document that it is from."""
    content: Any
    """Its tokens, or a text that begins with them."""


def deal(names: list[str], seed: int) -> list[int]:
    """A fold for each text: those of a class go to the folds in turn, in a random order."""
    folds, dealt = [0] * len(names), Counter()
    for i in np.random.default_rng(seed).permutation(len(names)):
        folds[i] = dealt[names[i]] % FOLDS
        dealt[names[i]] += 1
    return folds


def block(place: int, places: int) -> int | None:
    """The fold of one of a text's windows; None for the first of a block: the gap before it.

    | 0 . . . |gap| 1 . . . |gap| 2 . . . |gap| 3 . . . |
    """
    fold = place * FOLDS // places
    opens = place > 0 and (place - 1) * FOLDS // places < fold
    return None if opens else fold


def affordable(label: str, pieces: list[Piece], tokens: int, width: int) -> list[str]:
    """The classes with enough pieces of `width` tokens, of these the MOST most frequent, and not
    more than `tokens` pay for.

    UserError where fewer than two are left.
    """
    counts = Counter(piece.name for piece in pieces)
    folds = Counter((piece.name, piece.fold) for piece in pieces)
    good = [
        name
        for name, _ in counts.most_common()
        if all(folds[name, fold] >= LEAST for fold in range(FOLDS))
    ]
    if len(good) < 2:
        common = ", ".join(f"{name} ({n})" for name, n in counts.most_common(3))
        raise UserError(
            f"label={label}: {len(counts)} values and their pieces of text: {common}"
            f"{', ...' if len(counts) > 3 else ''}; a probe needs two values with "
            f"{LEAST * FOLDS} pieces or more each"
        )
    price = LEAST * FOLDS * width
    if tokens < 2 * price:
        raise UserError(f"tokens={tokens}: too few for two classes; give {2 * price} or more")
    return good[: min(MOST, tokens // price)]


def choose(pieces: list[Piece], classes: list[str], total: int) -> list[Piece]:
    """About `total` pieces, as many of each class and fold, spread evenly in the given order."""
    found = {name: [[] for _ in range(FOLDS)] for name in classes}
    for piece in pieces:
        if piece.name in found:
            found[piece.name][piece.fold].append(piece)
    quotas = shares([sum(map(len, folds)) for folds in found.values()], total)
    chosen = []
    for folds, quota in zip(found.values(), quotas, strict=True):
        for fold, share in zip(folds, shares([len(each) for each in folds], quota), strict=True):
            places = np.linspace(0, len(fold) - 1, share).round().astype(int)
            chosen += [fold[place] for place in places]
    return chosen


def shares(available: list[int], total: int) -> list[int]:
    """`total` dealt out equally, to none more than it has; what one cannot take goes to others."""
    given, left = [0] * len(available), total
    for rank, i in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        given[i] = min(available[i], left // (len(available) - rank))
        left -= given[i]
    return given
