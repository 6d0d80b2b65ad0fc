"""Texts that an explanation of a feature is made from, and others that it is tested on.

    catalogue   top      ■ □ ■ □ ■ □     ■ shown to the explainer
                spread   ■ □ ■ □         □ kept back: it fires there
    sample      fires    □ □ □ ...       fills up what is kept back
                silent   ○ ○ ○ ...       it fires nowhere in them

No two texts of a feature are from the same sequence, and no two read the same.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import AFTER, BEFORE, WINDOW, Catalogue, Examples

MIN_TEXTS = 4  # texts to explain from, and to test on
DOCUMENT_MARK = "¶"  # of the beginning and the end of documents

Found = tuple[int, Tensor, Tensor]
"""Number of a sequence; ids [WINDOW] in it, -1 beyond its ends; strengths [WINDOW] of a feature."""


class Window(NamedTuple):
    """A piece of text, and how strongly a feature fires on its tokens."""

    tokens: tuple[str, ...]
    """As they read; `special` ones as DOCUMENT_MARK."""
    strengths: tuple[float, ...]
    """One for each token; 0 where it is silent."""


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
        return len(self.shown) >= MIN_TEXTS and len(self.firing) >= MIN_TEXTS


def pick_features(catalogue: Catalogue, count: int, seed: int = 0) -> list[int]:
    """`count` random ones of the features that have examples to be shown and to be kept back."""
    found = (catalogue.top.strength > 0).sum(dim=1) + (catalogue.spread.strength > 0).sum(dim=1)
    able = (found >= 2 * MIN_TEXTS).nonzero().squeeze(1)
    drawn = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))[:count]
    return able[drawn].sort().values.tolist()


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
    special = {*special}
    words = [DOCUMENT_MARK if i in special else word for i, word in enumerate(catalogue.vocabulary)]
    return [_gather(catalogue, sample, feature, scored, words, seed) for feature in features]


def _gather(
    catalogue: Catalogue, sample: Sample, feature: int, scored: int, words: list[str], seed: int
) -> Evidence:
    rng = torch.Generator().manual_seed(seed * 1_000_003 + feature)
    strengths = sample.fired(feature)
    # [sequences, context] the greatest strength in the window around each place
    around = max_pool1d(pad(strengths, (BEFORE, AFTER)), WINDOW, stride=1)
    seen: set[object] = set()

    def new(found: Iterable[Found]) -> Iterator[Window]:
        """Windows of which neither the sequence nor the wording has been seen."""
        for sequence, ids, values in found:
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            window = Window(*zip(*((words[i], value) for i, value in pairs if i >= 0), strict=True))
            if not seen & {sequence, window.tokens}:
                seen.update((sequence, window.tokens))
                yield window

    top, spread = catalogue.top, catalogue.spread
    shown = [*new(chain(_examples(top, feature, 0), _examples(spread, feature, 0)))]
    # the strongest are at most half, as it is about where it fires at all
    firing = [*islice(new(_examples(top, feature, 1)), scored // 2)]
    others = chain(_examples(spread, feature, 1), _windows(sample, strengths, strengths > 0, rng))
    firing += islice(new(others), scored - len(firing))
    quiet = _windows(sample, strengths, sample.keep & (around == 0), rng)
    return Evidence(feature, shown, firing, [*islice(new(quiet), len(firing))])


def _examples(examples: Examples, feature: int, first: int) -> Iterator[Found]:
    """Every other example from the `first`, strongest first."""
    for i in range(first, examples.strength.shape[1], 2):
        if examples.strength[feature, i] > 0:
            sequence = int(examples.sequence[feature, i])
            yield sequence, examples.tokens[feature, i], examples.strengths[feature, i]


def _windows(
    sample: Sample, strengths: Tensor, allowed: Tensor, rng: torch.Generator
) -> Iterator[Found]:
    """A window around a random one of the allowed places of each sequence, in random order."""
    tokens = pad(sample.tokens, (BEFORE, AFTER), value=-1)
    strengths = pad(strengths, (BEFORE, AFTER))
    rows = allowed.any(dim=1).nonzero().squeeze(1)
    for row in rows[torch.randperm(len(rows), generator=rng)].tolist():
        places = allowed[row].nonzero().squeeze(1)
        place = int(places[torch.randint(len(places), (), generator=rng)])
        window = slice(place, place + WINDOW)
        yield int(sample.ids[row]), tokens[row, window], strengths[row, window]
