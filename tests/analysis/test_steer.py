"""A planted feature is written into the text, and every other thing stays as it was."""

import math

import pytest
import torch
from subjects import place
from tiny_llm import FAMILIES
from torch import nn

from sae_lightning.analysis.steer import Continuation, Mode, SteerTask, make_steering_section, steer
from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.directions import find_final_norm
from sae_lightning.llm.generate import Sampling
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.llm.vocabulary import read_vocabulary
from sae_lightning.sae import SAEConfig, build_sae

PROMPT, PLANTED = "the fox", 3
FREE = Sampling(temperature=1.0, seed=1)
COMMON = {
    "run": "x",
    "task": "steer",
    "llm": LLMConfig(name="smollm2"),
    "data": None,
    "layer": None,
}
LAST = SitePair(Site(2, Kind.resid), Site(2, Kind.resid))


@pytest.fixture(params=FAMILIES)
def planted(request, tiny):
    """An SAE behind the last block whose feature 3 is what the logit of token 70 reads."""
    return with_feature(tiny(request.param), LAST)


def with_feature(llm, sites, bias=-1e4):
    """Feature 3 writes what the logit of a token reads; `bias` far below 0 keeps it from firing."""
    config = SAEConfig(features=8, start_bias=0.0, decoder_norm=0.1)
    sae = build_sae(config, 24, 24).requires_grad_(False)
    sae.W_dec[PLANTED] = nn.functional.normalize(rows(llm)[token(llm)], dim=0)
    sae.b_enc[PLANTED] = bias
    return place(llm, sae, sites)


def rows(llm):
    """For each token the direction of the residual stream that its logit reads."""
    return find_final_norm(llm.model).apply_transpose(llm.model.get_output_embeddings().weight)


def token(llm) -> int:
    """The first token of text whose direction raises no other logit more than its own."""
    effect = (
        find_final_norm(llm.model).apply_linear(rows(llm))
        @ llm.model.get_output_embeddings().weight.T
    )
    return next(i for i in range(60, 80) if effect[i].argmax() == i)


def written(continuation) -> list[str]:
    return continuation.tokens[len(continuation.tokens) - continuation.written :]


def test_the_planted_token_is_written(planted):
    result = steer(planted, PLANTED, [1e4], PROMPT, tokens=5)
    word = read_vocabulary(planted.llm)[token(planted.llm)]
    assert written(result.steered[0]) == [word] * 5
    assert word not in written(result.unsteered)


def test_a_negative_strength_takes_the_token_away(planted):
    sae = planted.sae
    plain = steer(planted, PLANTED, [0.0], PROMPT, tokens=1).unsteered
    sae.W_dec[PLANTED] = rows(planted.llm)[read_vocabulary(planted.llm).index(written(plain)[0])]
    (without,) = steer(planted, PLANTED, [-100.0], PROMPT, tokens=5).steered
    assert written(plain)[0] not in written(without)


@pytest.mark.parametrize("sampling", [Sampling(), FREE], ids=["greedy", "drawn"])
def test_strength_0_writes_the_unsteered_text(planted, sampling):
    result = steer(planted, PLANTED, [0.0, 30.0], PROMPT, tokens=8, sampling=sampling)
    assert result.steered[0]._replace(strength=None) == result.unsteered
    assert result.steered[1].text != result.unsteered.text


def test_clamping_equals_adding_where_the_feature_is_off(planted):
    add, clamp = (
        steer(planted, PLANTED, [2.0, 30.0], PROMPT, tokens=6, mode=mode, sampling=FREE)
        for mode in Mode
    )
    assert add.steered == clamp.steered
    assert add.unsteered == clamp.unsteered


def test_clamping_takes_the_place_of_what_the_feature_says(tiny):
    """It fires at 50 everywhere: held at 50 nothing changes, held at 0 is 50 less."""
    subject = with_feature(tiny("llama"), LAST, bias=50.0)
    subject.sae.W_enc[:, PLANTED] = 0
    clamp = steer(subject, PLANTED, [50.0, 0.0], PROMPT, tokens=6, mode=Mode.clamp)
    add = steer(subject, PLANTED, [-50.0], PROMPT, tokens=6)
    assert clamp.steered[0]._replace(strength=None) == clamp.unsteered
    assert clamp.steered[1].text == add.steered[0].text != clamp.unsteered.text
    assert clamp.unsteered.activations == [50.0] * len(clamp.unsteered.tokens)
    assert clamp.unsteered.activation == 50


def test_a_strength_alone_gives_what_it_gives_beside_others(planted):
    together = steer(planted, PLANTED, [1.0, 5.0], PROMPT, tokens=6, sampling=FREE)
    alone = steer(planted, PLANTED, [5.0], PROMPT, tokens=6, sampling=FREE)
    assert together.steered[1].text == alone.steered[0].text


def test_a_transcoder_acts_at_its_target(tiny):
    """The MLP's output of the last block goes into the stream: the planted token comes, and held
    at a strength the activation counts that the encoder reads at the MLP's input."""
    llm = tiny("llama")
    subject = with_feature(llm, SitePair(Site(2, Kind.mlp_in), Site(2, Kind.mlp)), bias=50.0)
    subject.sae.W_enc[:, PLANTED] = 0
    word = read_vocabulary(llm)[token(llm)]
    result = steer(subject, PLANTED, [50.0, 150.0], PROMPT, tokens=4, mode=Mode.clamp)
    assert result.steered[0].text == result.unsteered.text
    assert written(result.steered[1]) == [word] * 4


def test_the_activation_is_that_of_the_unsteered_llm_on_the_text(planted):
    planted.sae.b_enc[PLANTED] = 1.0
    (continuation,) = steer(planted, PLANTED, [3.0], PROMPT, tokens=4).steered
    llm = planted.llm
    ids = [0, *map(read_vocabulary(llm).index, continuation.tokens)]
    x = capture(llm.model, torch.tensor([ids]), [LAST.source])[LAST.source][0, 1:]
    expected = planted.sae.encode(x)[:, PLANTED].tolist()
    assert continuation.activations == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 0


def test_the_section_shows_every_text(planted):
    result = steer(planted, PLANTED, [4.0, 100.0], PROMPT, tokens=5)
    shown = make_steering_section(result)
    assert [row[0] for row in shown.table.rows] == ["unsteered", "add 4", "add 100"]
    assert shown.table.rows[2][1] == f"{100 / result.full_strength:.0%}"
    assert [len(text.tokens) for text in shown.texts] == [
        len(c.tokens) for c in (result.unsteered, *result.steered)
    ]
    assert [text.strengths for text in shown.texts] == [
        c.activations for c in (result.unsteered, *result.steered)
    ]


def test_strengths_that_are_not_given_are_shares_of_the_activation(planted):
    """The row has length 1: a fifth to two fifths of the median length on the prompt's tokens."""
    result = steer(planted, PLANTED, None, PROMPT, tokens=2)
    ids = planted.llm.tokenizer.encode(PROMPT)
    y = capture(planted.llm.model, torch.tensor([[0, *ids]]), [LAST.target])[LAST.target]
    assert result.full_strength == pytest.approx(y[0, 1:].norm(dim=1).median().item(), rel=1e-4)
    shares = [c.strength / result.full_strength for c in result.steered]
    assert shares == pytest.approx([0.2, 0.3, 0.4], rel=0.05)


def test_a_text_that_ends_at_once_has_no_mean():
    nothing = Continuation(1.0, "", ["the"], [2.0], 0, math.nan)
    assert math.isnan(nothing.activation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature": None}, "feature=None: give one feature"),
        ({"feature": [1, 2]}, r"feature=\[1,2\]: give one feature, as feature=87"),
        ({"feature": 1.5}, "feature=1.5: give whole numbers"),
        ({"strength": "much"}, "strength=much: give a number"),
        ({"strength": math.inf}, "strength=inf: give a number"),
        ({"tokens": 0}, "tokens=0: give 1 or more"),
        ({"temperature": -1}, "temperature=-1: give 0 or more"),
        ({"top_p": 0}, "top_p=0: give a probability"),
    ],
)
def test_a_bad_setting_is_refused(settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        SteerTask(**{"feature": 3, **COMMON, **settings})


def test_a_feature_that_is_not_there_is_refused(planted):
    with pytest.raises(UserError, match="^feature=8: this SAE has 8 features; give 0 to 7"):
        steer(planted, 8, [1.0], PROMPT)
