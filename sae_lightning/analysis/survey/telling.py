"""Ranks features by how much they tell a reader: about rare words, each word's best feature first.

    token-set score x rarity of the tokens x words / (words + 1) / rank among features of that word

where words = different words in the token set, and "that word" is the first of them. No word list
is needed, so that it works for any language, and for code.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import TokenSetScores

PIECE_WEIGHT = 0.25  # of a piece of a word; a whole word has weight 1


def rate_telling(
    texts: np.ndarray, sample: Sample, reading: TokenSetScores, vocabulary: Sequence[str]
) -> Tensor:
    """[features] how much each tells, NaN where there is no score.

    texts: [sequences, context] ids of all tokens read, from which their rarity is computed.
    """
    owners = sample.owners().numpy()
    # the token that predicts: the active one or the one before, which exists as BOS never fires
    places = sample.places.numpy() - reading.previous.numpy()[owners]
    strengths, content = sample.strengths.numpy(), _weigh_tokens(texts, sample, vocabulary)[places]
    told, total = (
        np.bincount(owners, weights, minlength=sample.feature_count)
        for weights in (strengths * content, strengths)
    )
    words = [_find_words(tokens, vocabulary) for tokens in reading.tokens.tolist()]
    count = np.array([len(different) for different in words])
    value = reading.score.clamp(min=0).numpy() * (told / np.maximum(total, np.finfo(float).tiny))
    value *= count / (count + 1)
    value /= 1 + _count_better(value, [next(iter(different), "") for different in words])
    return torch.from_numpy(value).float()


def _weigh_tokens(texts: np.ndarray, sample: Sample, vocabulary: Sequence[str]) -> np.ndarray:
    """[places] how rare the token at each place of the sample is, from 0 to 1: its surprisal
    -log2 p above the mean (the entropy), divided by the greatest; 0 if it is no word."""
    share = np.bincount(texts.ravel(), minlength=len(vocabulary)) / texts.size
    surprisal = -np.log2(share.clip(min=1 / texts.size))
    above = surprisal - (share * surprisal).sum()
    rare = above.clip(min=0) / max(above.max(), 1e-9)
    rare[[not _is_word(token) for token in vocabulary]] = 0
    # letters that have a case are of scripts that write spaces between words
    opens = np.array([_has_case(token[:1]) for token in vocabulary])
    closes = np.array([_has_case(token[-1:]) for token in vocabulary])
    tokens = sample.tokens.numpy()
    joined = np.pad(closes[tokens[:, :-1]] & opens[tokens[:, 1:]], ((0, 0), (1, 1)))
    is_piece = joined[:, :-1] | joined[:, 1:]  # joined to the token before, or to the next one
    return (rare[tokens] * np.where(is_piece, PIECE_WEIGHT, 1)).ravel()


def _has_case(letter: str) -> bool:
    return letter.islower() or letter.isupper()


def _is_word(token: str) -> bool:
    """Whether a token is mostly letters, of any script."""
    text = token.strip()
    return 2 * sum(map(str.isalpha, text)) > len(text)


def _find_words(tokens: Sequence[int], vocabulary: Sequence[str]) -> list[str]:
    """The different words among some ids, in lower case and in order; -1 stands for no token."""
    words = (vocabulary[token] for token in tokens if token >= 0)
    return [*dict.fromkeys(word.strip().casefold() for word in words if _is_word(word))]


def _count_better(value: np.ndarray, word: Sequence[str]) -> np.ndarray:
    """[features] how many features of the same word have a greater value."""
    _, number = np.unique(word, return_inverse=True)
    order = np.lexsort((-value, number))
    first = np.flatnonzero(np.diff(number[order], prepend=-1))
    earlier = np.empty(len(order), np.int64)
    earlier[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return earlier
