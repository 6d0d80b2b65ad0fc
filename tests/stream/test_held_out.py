"""Held-out text: which tokens are scored, what is spliced in, and what is computed once."""

import copy
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from small_text import SEPARATOR

from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream import held_out as held_out_module
from sae_lightning.stream.documents import SplitDocuments
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.tokens import open_tokens

SITES = [Site(1, Kind.resid), Site(0, Kind.mlp)]
DOCUMENTS = ["abcdefgh" * 5, "hgfedcba" * 4, "abba" * 9]


def make(llm: LLM, **settings) -> HeldOut:
    data = Dataset.from_dict({"text": DOCUMENTS})
    tokens = open_tokens(SplitDocuments(data, data), llm.tokenizer, context=9, seed=0).held_out
    chosen = {"tokens": 1000, "loss_tokens": 40, "batch": 4} | settings
    return HeldOut(llm, tokens, chosen.pop("sites", SITES), **chosen)


@pytest.fixture
def planted(llm, monkeypatch) -> list[int]:
    """Activations are 5 times larger on token `a` at one site, and on token `b` at the other."""
    large = [llm.tokenizer.encode(letter)[0] for letter in "ab"]

    def scaled(model, tokens, sites, places):
        activations, read = capture(model, tokens, sites, places), tokens.flatten()[places]
        for site in activations:
            unit = activations[site] / activations[site].norm(dim=-1, keepdim=True)
            activations[site] = unit * (1 + 4 * (read == large[SITES.index(site)]))[:, None]
        return activations

    monkeypatch.setattr(held_out_module, "capture", scaled)
    return large


def scores_of(held_out, source, target, functions):
    """Scores of the LLM with each function spliced in as if it were an SAE."""
    saes = [lambda x, f=f: SimpleNamespace(reconstruction=f(x)) for f in functions]
    return held_out.measure_saes(source, target, saes, (), rows_per_call=1000)


def test_special_tokens_and_position_0_are_left_out(llm):
    held_out = make(llm)
    expected = held_out.tokens != SEPARATOR
    expected[:, 0] = False
    assert torch.equal(held_out.keep, expected)
    direct = capture(llm.model, held_out.tokens, SITES)
    for site in SITES:
        torch.testing.assert_close(held_out.activations(site), direct[site][expected])
    assert make(llm, keep_special=True).keep[:, 1:].all()


def test_outliers_are_neither_scored_nor_replaced(llm, planted):
    everything, usual = make(llm), make(llm, max_norm=3.0)
    large = torch.isin(usual.tokens, torch.tensor(planted))
    assert torch.equal(usual.keep, everything.keep & ~large)
    assert (everything.keep & large).any()
    for site in SITES:
        kept = usual.activations(site)
        assert torch.equal(kept, everything.activations(site)[~large[everything.keep]])
        assert kept.norm(dim=1).max() < 1.1
    seen = []
    scores_of(usual, SITES[0], SITES[0], [lambda x: seen.append(len(x)) or x])
    tokens, keep = usual._select_loss_text()
    assert len(tokens) == 5 < len(usual.tokens)
    assert sum(seen) == int(keep.sum())
    assert not keep[torch.isin(tokens, torch.tensor(planted))].any()


def test_an_outlier_at_another_site_counts_only_if_that_site_is_read(llm, planted):
    held_out = make(llm, max_norm=3.0, sites=SITES[:1])
    assert not held_out.keep[held_out.tokens == planted[0]].any()
    assert held_out.keep[:, 1:][held_out.tokens[:, 1:] == planted[1]].all()


def test_a_generous_max_norm_changes_nothing(llm):
    scores = [
        scores_of(make(llm, max_norm=m), SITES[0], SITES[0], [torch.tanh]) for m in (None, 1000.0)
    ]
    assert scores[0] == scores[1]


def test_what_does_not_depend_on_the_sae_is_computed_once(llm, monkeypatch):
    calls = []

    def counted(function):
        return lambda *args: calls.append(function.__name__) or function(*args)

    for function in (capture, held_out_module.score_baseline):
        monkeypatch.setattr(held_out_module, function.__name__, counted(function))
    held_out = make(llm, batch=100)
    for _ in range(3):
        held_out.activations(SITES[1])
        for site in SITES:
            scores_of(held_out, site, site, [torch.tanh])
        scores_of(held_out, SITES[1], SITES[0], [torch.tanh])
    assert calls == ["capture", "score_baseline", "score_baseline"]


def test_the_mlp_itself_in_place_of_what_it_writes_recovers_everything_and_zero_nothing(llm):
    source, target = sites = Site(1, Kind.mlp_in), Site(1, Kind.mlp)
    held_out = make(llm, sites=sites, loss_tokens=1000)
    mlp = copy.deepcopy(llm.model.model.layers[1].mlp)  # its own is spliced
    torch.testing.assert_close(mlp(held_out.activations(source)), held_out.activations(target))
    whole, nothing = scores_of(held_out, source, target, [mlp, torch.zeros_like])
    assert whole.ce_recovered == pytest.approx(1, abs=0.01)  # float32, by the difference
    assert nothing.ce_recovered == 0
    baseline = held_out.measure_baseline(target)
    assert nothing.ce_spliced == nothing.ce_zero == baseline.ce_zero != baseline.ce_clean
    assert nothing.ce_mean == baseline.ce_mean


def test_without_tokens_for_it_the_loss_is_not_measured(llm, monkeypatch):
    monkeypatch.delattr(held_out_module, "score_baseline")
    monkeypatch.delattr(held_out_module, "score_splices")
    held_out = make(llm, loss_tokens=0)
    assert scores_of(held_out, SITES[0], SITES[0], [torch.tanh, torch.sin]) == [None, None]
    assert torch.equal(held_out.activations(SITES[0]), make(llm).activations(SITES[0]))


def test_the_llm_is_not_kept_alive_by_a_cycle(llm):
    held_out = make(llm)
    scores_of(held_out, SITES[0], SITES[0], [torch.tanh])
    gone = weakref.ref(held_out)
    gc.disable()
    try:
        del held_out
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("number", "remedy"), [("float16", "llm.dtype"), ("float32", "eval.loss")])
def test_an_llm_that_overflows_above_the_sae_is_told_once(llm, capsys, number, remedy):
    model = copy.deepcopy(llm.model).to(getattr(torch, number))
    list(model.parameters())[-1].data.fill_(float("inf"))
    held_out = make(llm._replace(model=model), sites=SITES[1:])
    for _ in range(2):
        assert not all(map(math.isfinite, held_out.measure_baseline(SITES[1])))
    out = capsys.readouterr().out
    assert out.count("not finite") == out.count(remedy) == 1
    make(llm, sites=SITES[1:]).measure_baseline(SITES[1])
    assert "not finite" not in capsys.readouterr().out
