"""Rates how informative features are: the best are predicted well by rare words.

    token-set score * mean rarity of tokens * words / (words + 1) / rank

The mean is over the feature's firings, weighted by strength; words = number of different words in
the token set; rank = 1, 2, ... by the product so far, among features with the same first word.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample, rank_in_runs
from sae_lightning.report.catalogue import TokenSetScores

WORD_PART_WEIGHT = 0.25  # weight of a part of a word; that of a whole word is 1


def rate_informativeness(
    ids: np.ndarray, sample: Sample, token_sets: TokenSetScores, vocabulary: Sequence[str]
) -> Tensor:
    """Rate how informative each feature is [features], 0 to 1; NaN without a token-set score.

    ids: [sequences, context] all tokens read, for their rarity.
    """
    entry_units = sample.list_entry_units().numpy()
    # If the set predicts from the previous token, that token's rarity counts. (There is always one,
    # as nothing fires on BOS.)
    places = sample.places.numpy() - token_sets.previous.int().numpy()[entry_units]
    strengths, rarity = sample.strengths.numpy(), _measure_rarity(ids, sample, vocabulary)[places]
    weighted = np.bincount(entry_units, strengths * rarity, minlength=sample.unit_count)
    total = np.bincount(entry_units, strengths, minlength=sample.unit_count)
    mean_rarity = weighted / np.maximum(total, np.finfo(float).tiny)
    words = [_find_words(tokens, vocabulary) for tokens in token_sets.tokens.tolist()]
    counts = np.array([len(words_of_feature) for words_of_feature in words])
    rating = token_sets.score.clamp(min=0).numpy() * mean_rarity * (counts / (counts + 1))
    first_words = [next(iter(words_of_feature), "") for words_of_feature in words]
    rating /= 1 + _rank_within_word(rating, first_words)
    return torch.from_numpy(rating).float()


def _measure_rarity(ids: np.ndarray, sample: Sample, vocabulary: Sequence[str]) -> np.ndarray:
    """Compute the rarity [places], 0 to 1, of the token at each place of the sample: its surprisal
    -log2 p minus the mean surprisal, clipped at 0, divided by the largest value in the vocabulary;
    0 if the token is no word; multiplied by WORD_PART_WEIGHT if it is a part of a word."""
    share = np.bincount(ids.ravel(), minlength=len(vocabulary)) / ids.size
    surprisal = -np.log2(share.clip(min=1 / ids.size))  # unread tokens count as read once
    above_mean = surprisal - (share * surprisal).sum()
    rarity = above_mean.clip(min=0) / max(above_mean.max(), 1e-9)  # 0 if all are equally frequent
    rarity[[not _is_word(token) for token in vocabulary]] = 0
    # Scripts with upper and lower case put spaces between words. So if a token ends in a letter of
    # such a script and the next token begins with one, both are parts of one word.
    begins_cased = np.array([_has_case(token[:1]) for token in vocabulary])
    ends_cased = np.array([_has_case(token[-1:]) for token in vocabulary])
    tokens = sample.tokens.numpy()
    is_joined = ends_cased[tokens[:, :-1]] & begins_cased[tokens[:, 1:]]  # to the next token
    is_joined = np.pad(is_joined, ((0, 0), (1, 1)))
    is_part = is_joined[:, :-1] | is_joined[:, 1:]  # joined to the token before, or to the next one
    return (rarity[tokens] * np.where(is_part, WORD_PART_WEIGHT, 1)).ravel()


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


def _rank_within_word(rating: np.ndarray, first_words: Sequence[str]) -> np.ndarray:
    """Rank each feature by falling rating among those with the same first word, from 0."""
    _, word_index = np.unique(first_words, return_inverse=True)
    order = np.lexsort((-rating, word_index))
    rank = np.empty(len(order), np.int64)
    rank[order] = rank_in_runs(word_index[order])
    return rank
