"""Which features tell a reader most: those of words with a meaning, each word's best first."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import Reading


def telling(sample: Sample, reading: Reading, vocabulary: Sequence[str]) -> Tensor:
    """[features] score x content of the tokens that predict them / features so far of that word.

    The content of a token is its surprisal -log2 p in the text that was read, as a share of the
    largest; 0 unless it is a word. Nan where there is no score.
    """
    read = sample.tokens[sample.keep].long()
    counts = torch.bincount(read, minlength=len(vocabulary)).numpy()
    surprisal = -np.log2(counts.clip(min=1) / len(read)) / np.log2(max(len(read), 2))
    content = np.where([*map(_is_word, vocabulary)], surprisal, 0)
    owners, tokens = sample.owners().numpy(), sample.tokens.flatten().numpy()
    before = reading.previous.numpy()[owners]  # no feature fires on the first token of a text
    weights = sample.strengths.numpy()
    told = weights * content[tokens[sample.places.numpy() - before]]
    mean, total = (np.bincount(owners, x, minlength=sample.features) for x in (told, weights))
    value = reading.score.clamp(min=0).numpy() * (mean / np.maximum(total, np.finfo(float).tiny))
    return torch.from_numpy(
        value / (1 + _earlier(value, _first_words(reading, vocabulary)))
    ).float()


def _is_word(token: str) -> bool:
    """Mostly letters of any script."""
    shown = token.strip()
    return 2 * sum(map(str.isalpha, shown)) > len(shown)


def _first_words(reading: Reading, vocabulary: Sequence[str]) -> np.ndarray:
    """[features] a number for the word of the first token of each one's set."""
    numbers: dict[str, int] = {}
    firsts = reading.tokens[:, 0].tolist()
    words = (vocabulary[token].strip().casefold() if token >= 0 else "" for token in firsts)
    return np.array([numbers.setdefault(word, len(numbers)) for word in words])


def _earlier(value: np.ndarray, word: np.ndarray) -> np.ndarray:
    """[features] how many of the same word have a greater value."""
    order = np.lexsort((-value, word))
    first = np.flatnonzero(np.diff(word[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    earlier = np.empty(len(order), np.int64)
    earlier[order] = rank
    return earlier
