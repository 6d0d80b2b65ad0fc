"""What a newcomer sees first: words with a meaning, each word once."""

import math

import torch
from batches import batches

from sae_lightning.analysis.survey.reading import reading
from sae_lightning.analysis.survey.sample import Sampling
from sae_lightning.analysis.survey.telling import telling

#        often                 rare
WORDS = [" the", ",", "\n\n", " fox", " sea", "город", "_getName", "<0xE2>", ";;"]
OFTEN = 3


def told(*features, seed: int = 0) -> list[float]:
    """How telling features are that fire on these tokens; each can be a list of tokens, or a
    function of the tokens [sequences, context] that says where it fires."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.tensor([10.0] * OFTEN + [1.0] * (len(WORDS) - OFTEN))
    tokens = torch.multinomial(weights, 200 * 32, True, generator=random).view(200, 32)
    fires = [f(tokens) if callable(f) else torch.isin(tokens, torch.tensor(f)) for f in features]
    sampling = Sampling(len(features), 0)
    for batch in batches(torch.stack(fires, dim=2).float(), tokens):
        sampling.add(batch)
    sample = sampling.result()
    return telling(sample, reading(sample, len(WORDS)), WORDS).tolist()


def test_rare_words_come_before_common_ones_and_what_is_no_word_last():
    fox, the, comma, blank, byte, signs = told([3], [0], [1], [2], [7], [8])
    assert fox > 2 * the > 0
    assert comma == blank == byte == signs == 0


def test_letters_of_any_script_and_names_in_code_are_words():
    fox, city, name = told([3], [5], [6])
    assert min(city, name) > 0.8 * fox


def test_of_features_for_the_same_word_the_best_comes_first_and_each_other_counts_less():
    def sloppy(tokens):
        return (tokens == 3) & (torch.arange(32) % 4 > 0)

    copies = told([3], [3], sloppy, [4])
    first, second = copies[:2]
    assert second == first / 2
    assert copies[2] < first / 3
    assert copies[3] > 0.8 * first  # another word


def test_the_token_before_is_what_counts_where_that_is_what_predicts():
    after = told(lambda tokens: tokens.roll(1, dims=1) == 3)[0]
    assert after > 0.8 * told([3])[0]
    assert told(lambda tokens: tokens.roll(1, dims=1) == 1)[0] == 0


def test_a_feature_that_predicts_nothing_tells_nothing_and_one_that_never_fires_is_unknown():
    noise = told(lambda tokens: torch.rand(tokens.shape, generator=torch.Generator()) < 0.02, [3])
    assert noise[0] < 0.1 * noise[1]
    assert math.isnan(told([])[0])
