"""Rates how informative features are at first sight: those that rare words predict well.

    token-set score x mean rarity of tokens x words / (words + 1) / rank

The mean is over the feature's firings, weighted by strength; words = number of different words in
the token set; rank = 1 for the best feature with this first word, 2 for the next. As no word list
is needed, any language or code works.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample, rank_in_runs
from sae_lightning.report.catalogue import TokenSetScores

PIECE_WEIGHT = 0.25  # weight of a piece of a word; that of a whole word is 1


def rate_informativeness(
    ids: np.ndarray, sample: Sample, token_sets: TokenSetScores, vocabulary: Sequence[str]
) -> Tensor:
    """Rate how informative each feature is [features], 0 to 1; NaN without a token-set score.

    ids: [sequences, context] all tokens read, for their rarity.
    """
    entry_units = sample.list_entry_units().numpy()
    # the predicting token: the active or the previous one, which exists, as nothing fires on BOS
    places = sample.places.numpy() - token_sets.previous.numpy()[entry_units]
    strengths, rarity = sample.strengths.numpy(), _measure_rarity(ids, sample, vocabulary)[places]
    weighted, total = (
        np.bincount(entry_units, weights, minlength=sample.unit_count)
        for weights in (strengths * rarity, strengths)
    )
    mean_rarity = weighted / np.maximum(total, np.finfo(float).tiny)
    words = [_find_words(tokens, vocabulary) for tokens in token_sets.tokens.tolist()]
    counts = np.array([*map(len, words)])
    rating = token_sets.score.clamp(min=0).numpy() * mean_rarity * (counts / (counts + 1))
    first_words = [next(iter(words_of_feature), "") for words_of_feature in words]
    rating /= 1 + _count_better(rating, first_words)
    return torch.from_numpy(rating).float()


def _measure_rarity(ids: np.ndarray, sample: Sample, vocabulary: Sequence[str]) -> np.ndarray:
    """Compute the rarity [places], 0 to 1, of the token at each place of the sample: its surprisal
    -log2 p minus the entropy, clipped at 0, divided by the greatest such difference in the
    vocabulary; 0 if the token is no word. A piece of a word has PIECE_WEIGHT times that."""
    share = np.bincount(ids.ravel(), minlength=len(vocabulary)) / ids.size
    surprisal = -np.log2(share.clip(min=1 / ids.size))  # unread tokens count as read once
    above_mean = surprisal - (share * surprisal).sum()
    rarity = above_mean.clip(min=0) / max(above_mean.max(), 1e-9)  # 0 if all are equally frequent
    rarity[[not _is_word(token) for token in vocabulary]] = 0
    # Scripts with upper and lower case write spaces between words: where two such letters meet, two
    # tokens are pieces of one word.
    opens = np.array([_has_case(token[:1]) for token in vocabulary])
    closes = np.array([_has_case(token[-1:]) for token in vocabulary])
    tokens = sample.tokens.numpy()
    joined = np.pad(closes[tokens[:, :-1]] & opens[tokens[:, 1:]], ((0, 0), (1, 1)))
    is_piece = joined[:, :-1] | joined[:, 1:]  # joined to the token before, or to the next one
    return (rarity[tokens] * np.where(is_piece, PIECE_WEIGHT, 1)).ravel()


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
    """Count, for each feature, those with the same word and a greater value [features]."""
    _, word_index = np.unique(word, return_inverse=True)
    order = np.lexsort((-value, word_index))
    better = np.empty(len(order), np.int64)
    better[order] = rank_in_runs(word_index[order])
    return better
