"""The lens finds planted tokens at both ends, by weights alone and through the blocks."""

import math

import pytest
import torch
from subjects import make_subject
from tiny_llm import FAMILIES

from sae_lightning.analysis import lens as module
from sae_lightning.analysis.lens import lens, make_lens_section
from sae_lightning.analysis.ranked_tokens import rank_tokens
from sae_lightning.llm.directions import find_final_norm, read_embedding
from sae_lightning.llm.sites import Kind, Site, SitePair
from sae_lightning.llm.vocabulary import read_vocabulary

PLANTED, TOKEN = 5, 42
LAST = Site(2, Kind.resid)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(module, "FIT_TOKENS", 3000)


@pytest.fixture(params=FAMILIES)
def llm(request, tiny):
    return tiny(request.param)


def logits_of(llm, rows):
    return (
        find_final_norm(llm.model).apply_linear(rows) @ llm.model.get_output_embeddings().weight.T
    )


def plant(subject):
    """Feature 5 writes what raises the logit of token 42 by 1 and others as little as d dimensions
    allow, and reads where the embedding of that token is, likewise."""
    model = subject.llm.model
    sees = find_final_norm(model).apply_transpose(model.get_output_embeddings().weight)
    subject.sae.W_dec[PLANTED] = one_of(sees)
    subject.sae.W_enc[:, PLANTED] = one_of(read_embedding(model, len(subject.llm.tokenizer)))
    return subject


def one_of(matrix):
    """The direction whose product with row 42 is nearest 1 and with the others nearest 0."""
    return torch.linalg.pinv(matrix.double(), rtol=1e-4)[:, TOKEN].float()


def test_the_planted_token_comes_first_at_both_ends(llm):
    found = lens(plant(make_subject(llm)), top=3)
    assert found.effect.promoted[PLANTED, 0] == TOKEN
    assert found.read_tokens[PLANTED, 0] == TOKEN
    assert found.effect.promoted.shape == found.effect.suppressed.shape == (32, 3)
    assert found.read_tokens.shape == (32, 3)


def test_the_ranking_is_that_of_the_logits_at_a_fixed_scale(llm):
    subject = make_subject(llm)
    known = len(llm.tokenizer)
    logits = logits_of(llm, subject.sae.W_dec)[:, :known]
    found = lens(subject, top=5).effect
    assert torch.equal(found.promoted, logits.argsort(descending=True)[:, :5])
    assert torch.equal(found.suppressed, logits.argsort()[:, :5])


def test_sharpness_is_the_excess_kurtosis(tiny):
    """By hand: one token of n at 1 and the others at 0 is a coin with p = 1 / n, whose excess
    kurtosis is (1 - 6 p (1 - p)) / (p (1 - p))."""
    p = 1 / 20
    sharpness = rank_tokens(torch.eye(20)[:1], 1).sharpness
    assert math.isclose(sharpness.item(), (1 - 6 * p * (1 - p)) / (p * (1 - p)), rel_tol=1e-4)
    normal = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    assert abs(rank_tokens(normal, 1).sharpness.item()) < 0.1
    assert rank_tokens(torch.zeros(1, 20), 1).sharpness.isfinite().all()


def test_the_changes_of_logits_are_listed_and_counted_in_bins():
    """By hand: from -1 to 4, a bin is 0.1 wide."""
    effect = rank_tokens(torch.tensor([[0.05, 4, -1, 3.95, -0.95]]), 2)
    assert (effect.promoted.tolist(), effect.suppressed.tolist()) == ([[1, 3]], [[2, 4]])
    assert effect.raised.tolist() == [[4, pytest.approx(3.95)]]
    assert effect.lowered.tolist() == [[-1, pytest.approx(-0.95)]]
    counts = {i: n for i, n in enumerate(effect.histogram[0].tolist()) if n}
    assert counts == {0: 2, 10: 1, 49: 2}
    assert rank_tokens(torch.zeros(1, 5), 2).histogram.sum() == 5


@pytest.mark.parametrize("text", [False, True], ids=["direct", "blocks"])
def test_slices_of_features_change_nothing(tiny, words, monkeypatch, text):
    subject = make_subject(tiny("llama"))
    whole = lens(subject, 4, words(4000) if text else None)
    monkeypatch.setattr(module, "MAX_PRODUCTS", 250)  # two features at a time
    sliced = lens(subject, 4, words(4000) if text else None)
    tensors = ((*found.effect[:5], found.read_tokens) for found in (whole, sliced))
    for a, b in zip(*tensors, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(whole.effect.histogram.sum(1), sliced.effect.histogram.sum(1))


@pytest.mark.slow
def test_a_measured_effect_behind_the_last_block_is_what_norm_and_head_make_of_the_row(
    llm, words, monkeypatch
):
    """If it drowns what was there, the norm's scale is that of the row itself."""
    monkeypatch.setattr(module, "ADDED_LENGTH", 1e4)
    subject = make_subject(llm)
    subject.sites = SitePair(LAST, LAST)
    norm, rows = find_final_norm(llm.model), subject.sae.W_dec
    centred = rows - rows.mean(1, keepdim=True) if norm.centres else rows
    behind = norm.apply_linear(rows) / centred.norm(dim=1, keepdim=True)
    logits = (behind - behind.mean(0)) @ llm.model.get_output_embeddings().weight.T
    expected = logits[:, : len(llm.tokenizer)]
    found = lens(subject, 1, words(4000), range(32)).effect
    agree = found.promoted[:, 0] == expected.argmax(1)
    assert agree.float().mean() > 0.9  # all but ties within float32
    assert (found.suppressed[:, 0] == expected.argmin(1)).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("measured", [[], [PLANTED]], ids=["mapped", "measured"])
def test_a_planted_effect_is_found_through_the_blocks(llm, words, measured):
    """A row that the logit of a token reads, and no other logit more."""
    subject = make_subject(llm)
    subject.sites = SitePair(LAST, LAST)
    rows = find_final_norm(llm.model).apply_transpose(llm.model.get_output_embeddings().weight)
    token = next(i for i in range(40, 90) if logits_of(llm, rows)[i].argmax() == i)
    subject.sae.W_dec[PLANTED] = rows[token]
    assert token in lens(subject, 3, words(4000), measured).effect.promoted[PLANTED]


@pytest.mark.slow
def test_only_the_features_asked_for_are_measured(tiny, words):
    subject = make_subject(tiny("llama"))
    mapped, measured = (lens(subject, 5, words(4000), features) for features in ([], [3, 7]))
    same = (mapped.effect.promoted == measured.effect.promoted).all(1)
    assert same.sum() == 30
    assert not same[[3, 7]].any()
    assert torch.equal(mapped.read_tokens, measured.read_tokens)


def test_the_linear_map_is_the_one_that_made_the_data():
    random = torch.Generator().manual_seed(0)
    a, true = torch.randn(2000, 6, generator=random), torch.randn(6, 4, generator=random)
    fit = module._Ridge()
    for part in a.split(300):
        fit.add(part, part @ true + 5)
    # all directions have about variance 1: the ridge shrinks each to n / (n + 0.5 n)
    torch.testing.assert_close(fit.result() * 1.5, true, rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_what_is_read_through_blocks_is_found_behind_them(llm, words):
    """The encoder reads the mean activation that a token has behind block 1."""
    subject = make_subject(llm)
    text = words(4000)
    captured = Gathered()
    module.collect(subject, [text.next(300)], [captured], total=300)
    tokens, x = torch.cat(captured.tokens), torch.cat(captured.x)
    mine = x[tokens == TOKEN].mean(0) - x.mean(0)
    subject.sae.W_enc[:, PLANTED] = torch.linalg.lstsq(
        x - x.mean(0), (tokens == TOKEN).float()[:, None]
    ).solution[:, 0]
    assert mine @ subject.sae.W_enc[:, PLANTED] > 0
    assert TOKEN in lens(subject, 5, words(4000)).read_tokens[PLANTED]


class Gathered:
    def __init__(self):
        self.tokens, self.x = [], []

    def add(self, batch):
        self.tokens.append(batch.tokens[batch.keep])
        self.x.append(batch.x[batch.keep])


def test_without_a_path_there_is_nothing_to_say(tiny, words):
    llm = tiny("llama")
    found = lens(make_subject(llm, Kind.mlp_in))
    assert found.effect is None
    assert found.read_tokens.shape == (32, 10)
    found = lens(make_subject(llm, Kind.attn))
    assert found.read_tokens is None
    assert found.effect.promoted.shape == (32, 10)
    nothing = lens(make_subject(llm, Kind.attn))._replace(effect=None)
    shown = make_lens_section(nothing, read_vocabulary(llm))
    assert shown.table is None
    assert "no direct path" in shown.lead


@pytest.mark.parametrize("kind", Kind)
def test_through_the_blocks_every_site_has_both_ends(tiny, words, kind):
    found = lens(make_subject(tiny("llama"), kind), 4, words(4000))
    assert found.effect.promoted.shape == found.read_tokens.shape == (32, 4)


@pytest.mark.slow
def test_a_transcoder_reads_at_its_source_and_writes_at_its_target(llm, words):
    subject = plant(make_subject(llm, Kind.mlp_in, Kind.mlp))
    for found in (lens(subject, 3), lens(subject, 3, words(4000))):
        assert found.effect.promoted.shape == found.read_tokens.shape == (32, 3)
    assert lens(subject, 3).effect.promoted[PLANTED, 0] == TOKEN


def test_the_section_shows_tokens_with_their_spaces(tiny):
    subject = plant(make_subject(tiny("llama")))
    words, found = read_vocabulary(subject.llm), lens(subject, 3)
    shown = make_lens_section(found, words, [PLANTED, 0])
    assert shown.table.header == ["feature", "reads", "promotes", "suppresses", "sharpness"]
    assert [row[0] for row in shown.table.rows] == ["5", "0"]
    assert shown.table.rows[0][2].startswith(repr(words[TOKEN]))
    sharpest = make_lens_section(found, words).table.rows
    assert len(sharpest) == 10
    assert float(sharpest[0][-1]) == round(found.effect.sharpness.max().item(), 1)
