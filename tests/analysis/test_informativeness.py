"""What a newcomer sees first: words with a meaning, each word once."""

import math

import pytest
import torch
from batches import batches

from sae_lightning.analysis.survey.informativeness import rate_informativeness
from sae_lightning.analysis.survey.sample import SequenceSampler
from sae_lightning.analysis.survey.token_sets import score_token_sets

#        often                 rare
WORDS = [" the", ",", "\n\n", " fox", " sea", " город", " _getName", "<0xE2>", ";;", " fo", "xes"]
OFTEN, FO = 3, 9


def told(*features) -> list[float]:
    """How informative features are that fire on these tokens; each is a list of tokens, or a
    function of the tokens [sequences, context] that says where it fires."""
    random = torch.Generator().manual_seed(0)
    weights = torch.tensor([10.0] * OFTEN + [1.0] * (FO + 1 - OFTEN))
    tokens = torch.multinomial(weights, 200 * 32, True, generator=random).view(200, 32)
    tokens[:, 1:][tokens[:, :-1] == FO] = FO + 1  # " fo" is the beginning of a word
    fires = [f(tokens) if callable(f) else torch.isin(tokens, torch.tensor(f)) for f in features]
    sampling = SequenceSampler(len(features), 0)
    for batch in batches(torch.stack(fires, dim=2).float(), tokens):
        sampling.add(batch)
    sample = sampling.result()
    read = score_token_sets(sample, len(WORDS))
    return rate_informativeness(tokens.numpy(), sample, read, WORDS).tolist()


def test_words_that_are_rarer_than_the_mean_tell_something_and_nothing_else_does():
    fox, *others = told([3], [0], [1], [2], [7], [8])
    assert fox > 0.3
    assert others == [0] * 5  # the commonest word, signs, blanks, half a character


def test_letters_of_any_script_and_names_in_code_are_words():
    fox, city, name = told([3], [5], [6])
    assert min(city, name) > 0.8 * fox


def test_pieces_of_words_tell_less_than_whole_words():
    fox, start, end = told([3], [9], [10])
    assert 0 < max(start, end) < fox / 2


def test_several_words_tell_more_than_one():
    both, sea = told([3, 5], [4])
    assert both == pytest.approx(sea * (2 / 3) / (1 / 2), rel=0.1)


def test_of_features_for_the_same_word_the_best_comes_first_and_each_other_counts_less():
    def sloppy(tokens):
        return (tokens == 3) & (torch.arange(32) % 4 > 0)

    copies = told([3], [3], sloppy, [4])
    first, second = copies[:2]
    assert second == first / 2
    assert copies[2] < first / 3
    assert copies[3] > 0.8 * first  # another word


def test_the_token_before_is_what_counts_where_that_is_what_predicts():
    after, fox, after_comma = told(
        lambda tokens: tokens.roll(1, dims=1) == 3, [4], lambda tokens: tokens.roll(1, dims=1) == 1
    )
    assert after > 0.8 * fox
    assert after_comma == 0


def test_a_feature_that_predicts_nothing_tells_nothing_and_one_that_never_fires_is_unknown():
    noise = told(lambda tokens: torch.rand(tokens.shape, generator=torch.Generator()) < 0.02, [3])
    assert noise[0] < 0.1 * noise[1]
    assert math.isnan(told([])[0])
