"""Texts that an explanation of a feature is made from, and others that it is tested on.

    catalogue   top      ■ □ ■ □ ■ □     ■ shown to the explainer
                spread   ■ □ ■ □         □ kept back: it fires there
    sample      fires    □ □ □ ...       fills up what is kept back
                silent   ○ ○ ○ ...       it fires nowhere in them

No two texts of a feature are from the same sequence, and no two read the same.
"""

from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import AFTER, BEFORE, WINDOW, Catalogue, Examples

LEAST = 4  # texts to explain from, and to test on


class Window(NamedTuple):
    """A piece of text, and how strongly a feature fires on its tokens."""

    tokens: tuple[str, ...]
    """As they read; `special` ones as MARK."""
    strengths: tuple[float, ...]
    """One for each token; 0 where it is silent."""


MARK = "¶"  # of the beginning and the end of documents


class Evidence(NamedTuple):
    """What is known of where one feature fires."""

    feature: int
    shown: list[Window]
    """For the explainer; it fires in them."""
    firing: list[Window]
    """For the scores; it fires in them."""
    silent: list[Window]
    """For the scores; it fires nowhere in them."""

    @property
    def enough(self) -> bool:
        """Whether it fires in enough places to be explained."""
        return len(self.shown) >= LEAST and len(self.firing) >= LEAST


def gather(
    catalogue: Catalogue,
    sample: Sample,
    features: Collection[int],
    *,
    scored: int = 20,
    special: Collection[int] = (),
    seed: int = 0,
) -> list[Evidence]:
    """Evidence of each feature: half of its examples, and at most `scored` texts of each kind.

    catalogue: of the SAE's features, from the same reading of the text as `sample`, so that
    sequences have the same numbers; special: ids of tokens that stand for no text.
    """
    reader = _Reader(catalogue.vocabulary, frozenset(special))
    return [_gather(catalogue, sample, feature, scored, reader, seed) for feature in features]


def choose(catalogue: Catalogue, count: int, seed: int = 0) -> list[int]:
    """`count` random ones of the features that have examples to be shown and to be kept back."""
    found = (catalogue.top.strength > 0).sum(dim=1) + (catalogue.spread.strength > 0).sum(dim=1)
    able = (found >= 2 * LEAST).nonzero().squeeze(1)
    drawn = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))[:count]
    return able[drawn].sort().values.tolist()


class _Reader(NamedTuple):
    vocabulary: list[str]
    special: frozenset[int]

    def window(self, tokens: Tensor, strengths: Tensor) -> Window:
        """Of ids [WINDOW], -1 beyond the ends of the sequence, and strengths [WINDOW]."""
        pairs = zip(tokens.tolist(), strengths.tolist(), strict=True)
        inside = [
            (MARK if t in self.special else self.vocabulary[t], s) for t, s in pairs if t >= 0
        ]
        return Window(*zip(*inside, strict=True))


class _Distinct:
    """Lets a text pass if neither its sequence nor its wording has been seen."""

    def __init__(self):
        self.seen: set[object] = set()

    def __call__(self, texts: Iterator[tuple[int, Window]]) -> Iterator[Window]:
        for sequence, window in texts:
            if not self.seen & {sequence, window.tokens}:
                self.seen |= {sequence, window.tokens}
                yield window


def _gather(
    catalogue: Catalogue, sample: Sample, feature: int, scored: int, reader: _Reader, seed: int
) -> Evidence:
    random = torch.Generator().manual_seed(seed * 1_000_003 + feature)
    strengths = sample.fired(feature)
    # [sequences, context] the greatest strength in the window around each place
    around = max_pool1d(pad(strengths, (BEFORE, AFTER)), WINDOW, stride=1)
    new = _Distinct()
    top, spread = catalogue.top, catalogue.spread
    shown = [
        *new(_examples(top, feature, 0, reader)),
        *new(_examples(spread, feature, 0, reader)),
    ]
    # the strongest are at most half, as it is about where it fires at all
    firing = list(islice(new(_examples(top, feature, 1, reader)), scored // 2))
    others = chain(
        _examples(spread, feature, 1, reader),
        _windows(sample, strengths, strengths > 0, reader, random),
    )
    firing += islice(new(others), scored - len(firing))
    quiet = _windows(sample, strengths, sample.keep & (around == 0), reader, random)
    return Evidence(feature, shown, firing, list(islice(new(quiet), len(firing))))


def _examples(
    examples: Examples, feature: int, first: int, reader: _Reader
) -> Iterator[tuple[int, Window]]:
    """Every other example from the `first`, strongest first, with the number of its sequence."""
    for i in range(first, examples.strength.shape[1], 2):
        if examples.strength[feature, i] > 0:
            window = reader.window(examples.tokens[feature, i], examples.strengths[feature, i])
            yield int(examples.sequence[feature, i]), window


def _windows(
    sample: Sample, strengths: Tensor, allowed: Tensor, reader: _Reader, random: torch.Generator
) -> Iterator[tuple[int, Window]]:
    """A window around a random one of the allowed places of each sequence, in random order."""
    context = sample.tokens.shape[1]
    rows = allowed.any(dim=1).nonzero().squeeze(1)
    for row in rows[torch.randperm(len(rows), generator=random)].tolist():
        places = allowed[row].nonzero().squeeze(1)
        place = places[torch.randint(len(places), (), generator=random)]
        window = place + torch.arange(-BEFORE, AFTER + 1)
        inside = (window >= 0) & (window < context)
        window = window.clamp(0, context - 1)
        tokens = torch.where(inside, sample.tokens[row, window], -1)
        found = reader.window(tokens, torch.where(inside, strengths[row, window], 0))
        yield int(sample.ids[row]), found
