"""Texts to explain a feature from, and others to test the explanation on.

    catalogue   top      ■ □ ■ □ ■ □     ■ shown to the explainer
                random   ■ □ ■ □         □ kept for the test
    sample      fires    □ □ □ ...       more texts for the test
                silent   ○ ○ ○ ...       texts in which it is silent

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

MIN_TEXTS = 4  # fewest to explain from, and fewest to test on
DOCUMENT_MARK = "¶"  # stands for the beginning and the end of documents

RawWindow = tuple[int, Tensor, Tensor]
"""Number of its sequence; token ids [WINDOW], -1 beyond its ends; strengths [WINDOW]."""


class Window(NamedTuple):
    """A piece of text, and how strongly a feature fires on its tokens."""

    tokens: tuple[str, ...]
    """Tokens as strings; DOCUMENT_MARK for special tokens."""
    strengths: tuple[float, ...]
    """Strength on each token; 0 where the feature is silent."""


class Evidence(NamedTuple):
    """Texts in which one feature fires, and others in which it is silent."""

    feature: int
    shown: list[Window]
    """Texts for the explainer, in which the feature fires."""
    firing: list[Window]
    """Texts for the test, in which the feature fires."""
    silent: list[Window]
    """Texts for the test, in which the feature is silent."""

    @property
    def is_enough(self) -> bool:
        """Whether there are enough texts to explain the feature and to test the explanation."""
        return len(self.shown) >= MIN_TEXTS and len(self.firing) >= MIN_TEXTS


def pick_features(catalogue: Catalogue, count: int, seed: int = 0) -> list[int]:
    """Pick `count` random features with enough examples to explain and to test."""
    examples = (catalogue.top.peak_strength > 0).sum(dim=1) + (
        catalogue.random.peak_strength > 0
    ).sum(dim=1)
    candidates = (examples >= 2 * MIN_TEXTS).nonzero().squeeze(1)
    drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:count]
    return candidates[drawn].sort().values.tolist()


def gather(
    catalogue: Catalogue,
    sample: Sample,
    features: Collection[int],
    *,
    scored: int = 20,
    special: Collection[int] = (),
    seed: int = 0,
) -> list[Evidence]:
    """Gather the evidence for each of `features`: half of its examples are shown to the explainer;
    the rest, and random texts, make at most `scored` texts of each kind for the test.

    catalogue: of the SAE's features, from the same pass over the text as `sample`, so that
    sequences have the same numbers; special: ids shown as DOCUMENT_MARK.
    """
    special = {*special}
    words = [DOCUMENT_MARK if i in special else word for i, word in enumerate(catalogue.vocabulary)]
    return [_gather_one(catalogue, sample, feature, scored, words, seed) for feature in features]


def _gather_one(
    catalogue: Catalogue, sample: Sample, feature: int, scored: int, words: list[str], seed: int
) -> Evidence:
    rng = torch.Generator().manual_seed(seed * 1_000_003 + feature)
    strengths = sample.densify(feature)
    # [sequences, context] greatest strength in the window around each position
    around = max_pool1d(pad(strengths, (BEFORE, AFTER)), WINDOW, stride=1)
    seen: set[object] = set()  # numbers of sequences, and wordings

    def skip_seen(windows: Iterable[RawWindow]) -> Iterator[Window]:
        """Windows whose sequence and wording are both new."""
        for sequence, ids, values in windows:
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            window = Window(*zip(*((words[i], value) for i, value in pairs if i >= 0), strict=True))
            if not seen & {sequence, window.tokens}:
                seen.update((sequence, window.tokens))
                yield window

    top, random = catalogue.top, catalogue.random
    shown = [*skip_seen(chain(_take_examples(top, feature, 0), _take_examples(random, feature, 0)))]
    # at most half are top examples: the test is on firing at any strength
    firing = [*islice(skip_seen(_take_examples(top, feature, 1)), scored // 2)]
    others = chain(
        _take_examples(random, feature, 1), _draw_windows(sample, strengths, strengths > 0, rng)
    )
    firing += islice(skip_seen(others), scored - len(firing))
    silent = _draw_windows(sample, strengths, sample.keep & (around == 0), rng)
    return Evidence(feature, shown, firing, [*islice(skip_seen(silent), len(firing))])


def _take_examples(examples: Examples, feature: int, first: int) -> Iterator[RawWindow]:
    """Every other example, from index `first` on."""
    for i in range(first, examples.peak_strength.shape[1], 2):
        if examples.peak_strength[feature, i] > 0:
            sequence = int(examples.sequence[feature, i])
            yield sequence, examples.tokens[feature, i], examples.strengths[feature, i]


def _draw_windows(
    sample: Sample, strengths: Tensor, allowed: Tensor, rng: torch.Generator
) -> Iterator[RawWindow]:
    """A window around one random allowed position of each sequence, in random order."""
    tokens = pad(sample.tokens, (BEFORE, AFTER), value=-1)
    strengths = pad(strengths, (BEFORE, AFTER))
    rows = allowed.any(dim=1).nonzero().squeeze(1)
    for row in rows[torch.randperm(len(rows), generator=rng)].tolist():
        positions = allowed[row].nonzero().squeeze(1)
        position = int(positions[torch.randint(len(positions), (), generator=rng)])
        window = slice(position, position + WINDOW)
        yield int(sample.sequence_indices[row]), tokens[row, window], strengths[row, window]
