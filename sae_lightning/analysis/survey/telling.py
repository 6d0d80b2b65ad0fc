"""Ranks features by how much they tell a reader: rare words first, each word's best feature first.

    token-set score x mean rarity of tokens x words / (words + 1) / rank among features of that word

The mean is over the feature's firings, weighted by strength; words = number of different words in
the token set; that word = the first of them. As no word list is needed, any language or code works.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import TokenSetScores

PIECE_WEIGHT = 0.25  # for a piece of a word; a whole word has weight 1


def rate_telling(
    texts: np.ndarray, sample: Sample, reading: TokenSetScores, vocabulary: Sequence[str]
) -> Tensor:
    """Rate how telling each feature is [features], NaN without a score.

    texts: ids [sequences, context] of all tokens read, for their rarity.
    """
    owners = sample.owners().numpy()
    # the predicting token: the active or the previous one, which exists, as nothing fires on BOS
    places = sample.places.numpy() - reading.previous.numpy()[owners]
    strengths, content = sample.strengths.numpy(), _weigh_tokens(texts, sample, vocabulary)[places]
    weighted, total = (
        np.bincount(owners, weights, minlength=sample.feature_count)
        for weights in (strengths * content, strengths)
    )
    words = [_find_words(tokens, vocabulary) for tokens in reading.tokens.tolist()]
    count = np.array([len(different) for different in words])
    value = reading.score.clamp(min=0).numpy() * (
        weighted / np.maximum(total, np.finfo(float).tiny)
    )
    value *= count / (count + 1)
    value /= 1 + _count_better(value, [next(iter(different), "") for different in words])
    return torch.from_numpy(value).float()


def _weigh_tokens(texts: np.ndarray, sample: Sample, vocabulary: Sequence[str]) -> np.ndarray:
    """Compute the rarity [places], 0 to 1, of the token at each place of the sample: its surprisal
    -log2 p minus the entropy, over the greatest, clipped at 0; 0 if it is no word. Pieces of words
    are weighted by PIECE_WEIGHT."""
    share = np.bincount(texts.ravel(), minlength=len(vocabulary)) / texts.size
    surprisal = -np.log2(share.clip(min=1 / texts.size))
    above = surprisal - (share * surprisal).sum()
    rare = above.clip(min=0) / max(above.max(), 1e-9)
    rare[[not _is_word(token) for token in vocabulary]] = 0
    # scripts with upper and lower case write spaces between words
    opens = np.array([_has_case(token[:1]) for token in vocabulary])
    closes = np.array([_has_case(token[-1:]) for token in vocabulary])
    tokens = sample.tokens.numpy()
    joined = np.pad(closes[tokens[:, :-1]] & opens[tokens[:, 1:]], ((0, 0), (1, 1)))
    is_piece = joined[:, :-1] | joined[:, 1:]  # joined to the token before, or to the next one
    return (rare[tokens] * np.where(is_piece, PIECE_WEIGHT, 1)).ravel()


def _has_case(letter: str) -> bool:
    return letter.islower() or letter.isupper()


def _is_word(token: str) -> bool:
    """Tell whether a token is mostly letters, of any script."""
    text = token.strip()
    return 2 * sum(map(str.isalpha, text)) > len(text)


def _find_words(tokens: Sequence[int], vocabulary: Sequence[str]) -> list[str]:
    """List the different words among token ids (-1 is padding), in lower case, in order."""
    words = (vocabulary[token] for token in tokens if token >= 0)
    return [*dict.fromkeys(word.strip().casefold() for word in words if _is_word(word))]


def _count_better(value: np.ndarray, word: Sequence[str]) -> np.ndarray:
    """Count the features of the same word that have a greater value [features]."""
    _, number = np.unique(word, return_inverse=True)
    order = np.lexsort((-value, number))
    first = np.flatnonzero(np.diff(number[order], prepend=-1))
    earlier = np.empty(len(order), np.int64)
    earlier[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return earlier
