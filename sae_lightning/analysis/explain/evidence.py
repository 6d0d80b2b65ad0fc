"""Texts to explain a feature from, and others to test the explanation on.

    examples in the catalogue   top      ■ □ ■ □ ■ □     ■ shown to the explainer
                                random   ■ □ ■ □         □ kept for the test
    windows of the sample       firing   □ □ □ ...       more texts for the test
                                silent   ○ ○ ○ ...       texts in which the feature is silent

All texts of a feature are from different sequences, and no two texts are equal.
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
"""Index of a sequence; token ids [WINDOW], -1 beyond the sequence's ends; strengths [WINDOW]."""


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
    peaks = torch.cat([catalogue.top.peak_strength, catalogue.random.peak_strength], dim=1)
    example_counts = (peaks > 0).sum(dim=1)  # a peak of 0 is padding
    candidates = (example_counts >= 2 * MIN_TEXTS).nonzero().squeeze(1)
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
    """Gather the evidence for each of `features`. Every other example in the catalogue is for the
    explainer. The remaining ones and random windows of the sample are for the test: at most
    `scored` texts in which the feature fires, and at most as many in which it is silent.

    catalogue: of the SAE's features, from the same pass over the text as `sample`, so that a
    sequence has the same index in both; special: ids of tokens shown as DOCUMENT_MARK."""
    special, vocabulary = {*special}, catalogue.vocabulary
    token_texts = [DOCUMENT_MARK if i in special else text for i, text in enumerate(vocabulary)]
    return [_gather_one(catalogue, sample, i, scored, token_texts, seed) for i in features]


def _gather_one(
    catalogue: Catalogue,
    sample: Sample,
    feature: int,
    scored: int,
    token_texts: list[str],
    seed: int,
) -> Evidence:
    """Gather the evidence for one feature; token_texts: by token id."""
    # a seed for each feature, so that its texts do not depend on which other features are explained
    rng = torch.Generator().manual_seed(seed * 1_000_003 + feature)
    strengths = sample.densify(feature)
    # [sequences, context] greatest strength in the window around each position
    window_maximum = max_pool1d(pad(strengths, (BEFORE, AFTER)), WINDOW, stride=1)
    seen: set[int | tuple[str, ...]] = set()  # indices of sequences, and the tokens of windows

    def skip_seen(windows: Iterable[RawWindow]) -> Iterator[Window]:
        """Yield the windows whose sequence and tokens are both new."""
        for sequence, ids, values in windows:
            inside = ids >= 0
            tokens = tuple(token_texts[i] for i in ids[inside].tolist())
            window = Window(tokens, tuple(values[inside].tolist()))
            if sequence not in seen and window.tokens not in seen:
                seen.update((sequence, window.tokens))
                yield window

    top, random = catalogue.top, catalogue.random
    examples = chain(_take_examples(top, feature, 0), _take_examples(random, feature, 0))
    shown = [*skip_seen(examples)]
    # at most half are top examples, so that the test includes firing at any strength
    firing = [*islice(skip_seen(_take_examples(top, feature, 1)), scored // 2)]
    windows = _draw_windows(sample, strengths, strengths > 0, rng)
    more = skip_seen(chain(_take_examples(random, feature, 1), windows))
    firing += islice(more, scored - len(firing))
    silent = _draw_windows(sample, strengths, sample.keep & (window_maximum == 0), rng)
    return Evidence(feature, shown, firing, [*islice(skip_seen(silent), len(firing))])


def _take_examples(examples: Examples, feature: int, first: int) -> Iterator[RawWindow]:
    """Yield every other example of a feature, from index `first` on."""
    for i in range(first, examples.peak_strength.shape[1], 2):
        if examples.peak_strength[feature, i] > 0:
            sequence = int(examples.sequence[feature, i])
            yield sequence, examples.tokens[feature, i], examples.strengths[feature, i]


def _draw_windows(
    sample: Sample, strengths: Tensor, allowed: Tensor, rng: torch.Generator
) -> Iterator[RawWindow]:
    """Yield a window around one random position of each sequence, for sequences in random order.
    allowed: [sequences, context] bool: the positions to choose from."""
    tokens = pad(sample.tokens, (BEFORE, AFTER), value=-1)
    strengths = pad(strengths, (BEFORE, AFTER))
    candidates = allowed.any(dim=1).nonzero().squeeze(1)  # indices of sequences in the sample
    for i in candidates[torch.randperm(len(candidates), generator=rng)].tolist():
        positions = allowed[i].nonzero().squeeze(1)
        position = int(positions[torch.randint(len(positions), (), generator=rng)])
        # begins BEFORE tokens before the position, because of the padding
        window = slice(position, position + WINDOW)
        yield int(sample.sequence_indices[i]), tokens[i, window], strengths[i, window]
