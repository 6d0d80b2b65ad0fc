"""Which features tell a reader most: of words that are rare in the text, each word's best first.

    token score x rarity of the tokens x words / (words + 1) / features so far of the first word

No list of words is needed, so that any language, and code, will do.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import TokenSetScores

PIECE_WEIGHT = 0.25  # what a piece of a word counts, against a whole word


def rate_telling(
    texts: np.ndarray, sample: Sample, reading: TokenSetScores, vocabulary: Sequence[str]
) -> Tensor:
    """[features] how much each tells, nan where there is no score.

    texts: [sequences, context] ids of all that was read, which say what is rare in it.
    """
    owners = sample.owners().numpy()
    # the token before, where that is what predicts; no feature fires on the first of a text
    places = sample.places.numpy() - reading.previous.numpy()[owners]
    strengths, content = sample.strengths.numpy(), _weigh_tokens(texts, sample, vocabulary)[places]
    told, total = (
        np.bincount(owners, each, minlength=sample.unit_count)
        for each in (strengths * content, strengths)
    )
    words = [_find_words(tokens, vocabulary) for tokens in reading.tokens.tolist()]
    several = np.array([len(each) for each in words])
    value = reading.score.clamp(min=0).numpy() * (told / np.maximum(total, np.finfo(float).tiny))
    value *= several / (several + 1)
    value /= 1 + _count_better(value, [next(iter(each), "") for each in words])
    return torch.from_numpy(value).float()


def _weigh_tokens(texts: np.ndarray, sample: Sample, vocabulary: Sequence[str]) -> np.ndarray:
    """[places] of the sample: how much rarer the token is than the mean, from 0 to 1 (surprisals
    -log2 p above their mean, the entropy, as a share of the most); 0 where it is no word."""
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
    """Mostly letters of any script."""
    shown = token.strip()
    return 2 * sum(map(str.isalpha, shown)) > len(shown)


def _find_words(tokens: Sequence[int], vocabulary: Sequence[str]) -> list[str]:
    """Different words among some ids, of which -1 is none; in lower case, the first one first."""
    words = (vocabulary[token] for token in tokens if token >= 0)
    return [*dict.fromkeys(word.strip().casefold() for word in words if _is_word(word))]


def _count_better(value: np.ndarray, word: Sequence[str]) -> np.ndarray:
    """[features] how many of the same word have a greater value."""
    _, number = np.unique(word, return_inverse=True)
    order = np.lexsort((-value, number))
    first = np.flatnonzero(np.diff(number[order], prepend=-1))
    earlier = np.empty(len(order), np.int64)
    earlier[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return earlier
