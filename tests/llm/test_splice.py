"""Splicing costs nothing for the identity, everything for zero, and touches kept positions only."""

import copy
import math

import pytest
import torch
import transformers
from blocks import mlp_of
from tiny_llm import MODERN
from torch import nn

from sae_lightning.errors import UserError
from sae_lightning.llm import splice
from sae_lightning.llm.capture import capture, replace_activations
from sae_lightning.llm.sites import Kind, Site, find_decoder_stack
from sae_lightning.llm.splice import compute_logits, run_body, score_baseline, score_splices

SITES = [Site(1, kind) for kind in Kind]
RESID = Site(1, Kind.resid)
PAIRS = [(a, b) for a in SITES for b in SITES if a < b]


@pytest.fixture
def keep(tokens):
    return tokens != 0


@pytest.fixture
def mean():
    return torch.linspace(-1, 1, 24)


def scored(llm, tokens, site, function, keep, mean, batch=3, source=None):
    known = score_baseline(llm.model, tokens, site, keep, mean, batch)
    (scores,) = score_splices(
        llm.model, tokens, source or site, site, [function], keep, known, batch
    )
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_identity_recovers_everything_and_zero_nothing(llm, tokens, keep, mean, site):
    identity = scored(llm, tokens, site, lambda x: x, keep, mean)
    assert identity.ce_spliced == identity.ce_clean
    assert (identity.ce_recovered, identity.kl) == (1, 0)
    zero = scored(llm, tokens, site, torch.zeros_like, keep, mean)
    assert zero.ce_spliced == zero.ce_zero != zero.ce_clean
    assert zero.ce_recovered == 0
    assert zero.kl > 0
    constant = scored(llm, tokens, site, lambda x: mean.expand_as(x), keep, mean)
    assert constant.ce_spliced == constant.ce_mean != constant.ce_zero


def score_error(llm, tokens, function, keep, mean, mean_output):
    known = score_baseline(llm.model, tokens, RESID, keep, mean, batch=3)
    sites = {"source": RESID, "target": RESID}
    (scores,) = score_splices(
        llm.model,
        tokens,
        functions=[function],
        keep=keep,
        baseline=known,
        batch=3,
        means=[mean_output],
        **sites,
    )
    return scores


def test_the_error_of_a_perfect_function_is_worth_the_mean_and_that_of_a_constant_everything(
    llm, tokens, keep, mean
):
    """y - f(x) + E[f]: the mean of y where f(x) = y, and y itself where f is constant."""
    perfect = score_error(llm, tokens, lambda x: x, keep, mean, mean)
    assert perfect.ce_error == perfect.ce_mean != perfect.ce_clean == perfect.ce_spliced
    constant = score_error(llm, tokens, lambda x: mean.expand_as(x), keep, mean, mean)
    assert constant.ce_error == pytest.approx(constant.ce_clean, abs=1e-6)
    assert constant.ce_spliced == constant.ce_mean
    half = score_error(llm, tokens, lambda x: x / 2, keep, mean, mean / 2)
    by_hand = scored(llm, tokens, RESID, lambda x: x / 2 + mean / 2, keep, mean)
    assert half.ce_error == pytest.approx(by_hand.ce_spliced, abs=1e-6)
    assert half[:-1] == scored(llm, tokens, RESID, lambda x: x / 2, keep, mean)[:-1]


def test_the_mlp_itself_as_a_transcoder_recovers_everything_and_zero_nothing(
    llm, tokens, keep, mean
):
    sites = {"source": Site(1, Kind.mlp_in), "site": Site(1, Kind.mlp)}
    mlp = mlp_of(copy.deepcopy(find_decoder_stack(llm.model)[1]))  # its own is spliced
    whole = scored(llm, tokens, function=mlp, keep=keep, mean=mean, **sites)
    assert math.isclose(whole.ce_spliced, whole.ce_clean, rel_tol=1e-6)
    assert math.isclose(whole.ce_recovered, 1, rel_tol=1e-3)  # float32, by the difference
    assert math.isclose(whole.kl, 0, abs_tol=1e-6)
    zero = scored(llm, tokens, function=torch.zeros_like, keep=keep, mean=mean, **sites)
    assert zero.ce_spliced == zero.ce_zero != zero.ce_clean
    assert zero.ce_recovered == 0


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_the_function_reads_the_source_as_the_clean_model_has_it(
    llm, tokens, keep, mean, source, target
):
    """Also where the model adds to that memory later (Falcon) or flattens one of both (OPT)."""
    x, y = capture(llm.model, tokens, [source, target]).values()
    seen = []

    def function(x):
        seen.append(x)
        return y[keep]

    scores = scored(llm, tokens, target, function, keep, mean, batch=4, source=source)
    torch.testing.assert_close(torch.cat(seen), x[keep], rtol=0, atol=0)
    assert (scores.ce_spliced, scores.kl) == (scores.ce_clean, 0)


def test_clean_cross_entropy_is_the_models_own_loss(llm, tokens, keep, mean):
    scores = scored(llm, tokens, RESID, lambda x: x, keep, mean)
    with torch.no_grad():
        loss = llm.model(input_ids=tokens, labels=tokens).loss.item()
    assert math.isclose(scores.ce_clean, loss, rel_tol=1e-5)


@pytest.mark.parametrize("kind", Kind)
def test_spliced_scores_match_a_model_whose_site_is_changed_by_hand(tiny, tokens, mean, kind):
    """The last block's output is all that reaches the head: norm and head give the logits."""
    llm = tiny("llama")
    model = llm.model
    source, target = Site(2, kind), Site(2, Kind.resid)
    keep = (tokens != 0) & (torch.arange(10) != 4)  # position 4 plays a special token
    scores = scored(llm, tokens, target, lambda x: 0.5 * x + 1, keep, mean, batch=2, source=source)

    found = capture(model, tokens, [source, target])
    x, y = found[source], found[target]
    changed = torch.where(keep[..., None], 0.5 * x + 1, y)
    with torch.no_grad():
        log_p = model.lm_head(model.model.norm(y)).double().log_softmax(-1)[:, :-1]
        log_q = model.lm_head(model.model.norm(changed)).double().log_softmax(-1)[:, :-1]
    counted = keep[:, 1:]
    nll = -log_q.gather(-1, tokens[:, 1:, None])[..., 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert math.isclose(scores.ce_spliced, nll[counted].mean().item(), rel_tol=1e-5)
    assert math.isclose(scores.kl, kl[counted].mean().item(), rel_tol=1e-4)


def test_the_function_sees_kept_positions_only_in_float32(tiny, tokens, keep, mean):
    llm = tiny("gpt2")
    site = Site(1, Kind.resid)
    x = capture(llm.model, tokens, [site])[site]
    seen = []
    scored(llm, tokens, site, lambda x: seen.append(x) or x, keep, mean)
    assert seen[0].dtype is torch.float32
    torch.testing.assert_close(torch.cat(seen), x[keep])


def test_positions_that_are_not_kept_stay_as_they_are(tiny, tokens, mean):
    nowhere_before_the_end = torch.zeros(4, 10, dtype=torch.bool)
    nowhere_before_the_end[:, -1] = True  # the last position predicts nothing
    scores = scored(tiny("gpt2"), tokens, RESID, torch.zeros_like, nowhere_before_the_end, mean)
    assert scores.ce_spliced == scores.ce_zero == scores.ce_mean == scores.ce_clean
    assert math.isnan(scores.ce_recovered)


def test_scores_do_not_depend_on_the_batch(tiny, tokens, keep, mean):
    llm = tiny("gpt_neox")
    one, all_ = (
        scored(llm, tokens, SITES[0], torch.tanh, keep, mean, batch=batch) for batch in (1, 4)
    )
    for a, b in zip(one[:-1], all_[:-1], strict=True):
        assert math.isclose(a, b, rel_tol=1e-3)  # float32, amplified by the difference


def test_logits_are_made_of_a_few_kept_positions_at_a_time(tiny, tokens, keep, monkeypatch):
    llm, rows = tiny("gemma2"), []
    whole = scored(llm, tokens, RESID, torch.tanh, keep, torch.zeros(24))
    head = llm.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
    monkeypatch.setattr(splice, "LOGIT_ROWS", 7)
    monkeypatch.setattr(splice, "FLOAT32_ROWS", {"cpu": 3})
    try:
        parts = scored(llm, tokens, RESID, torch.tanh, keep, torch.zeros(24))
    finally:
        hook.remove()
    assert max(rows) == 7
    # the clean model twice, zero, mean and the function: no position that is not scored
    assert sum(rows) == 5 * int(keep[:, 1:].sum())
    for a, b in zip(parts[:-1], whole[:-1], strict=True):
        assert math.isclose(a, b, rel_tol=1e-3)  # float32, amplified by the difference


def test_a_baseline_serves_every_function(tiny, tokens, keep, mean):
    llm, done = tiny("gemma2"), []
    once = score_baseline(llm.model, tokens, SITES[1], keep, mean, 3, done.append)
    functions = [torch.tanh, torch.sin]
    both = SITES[1], SITES[1]
    together = score_splices(llm.model, tokens, *both, functions, keep, once, 3, done.append)
    assert done == [3, 1, 3, 1]
    for function, scores in zip(functions, together, strict=True):
        assert once == (scores.ce_clean, scores.ce_zero, scores.ce_mean)
        assert [scores] == score_splices(llm.model, tokens, *both, [function], keep, once, 3)
    assert together[0] != together[1]


def test_nothing_to_score_is_an_error(tiny, tokens, mean):
    with pytest.raises(ValueError, match="nothing to score"):
        scored(tiny("gpt2"), tokens, SITES[0], torch.tanh, torch.zeros_like(tokens).bool(), mean)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_replaced_restores_the_model_also_after_an_exception(llm, tokens, site):
    def zero(x, y):
        assert torch.equal(x, y)
        return torch.zeros_like(y)

    with torch.no_grad():
        before = llm.model(input_ids=tokens).logits
        with replace_activations(llm.model, site, site, zero):
            during = llm.model(input_ids=tokens).logits
        with pytest.raises(RuntimeError), replace_activations(llm.model, site, site, zero):
            raise RuntimeError
        after = llm.model(input_ids=tokens).logits
    assert not torch.allclose(before, during)
    assert torch.equal(before, after)


@torch.no_grad()
def check_logits(model, tokens):
    whole = model(input_ids=tokens, use_cache=False).logits
    places = torch.tensor([3, 0, 11, 39])
    output = run_body(model, tokens)
    some = compute_logits(model, output, output.last_hidden_state.flatten(0, 1)[places])
    torch.testing.assert_close(some, whole.flatten(0, 1)[places])
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole), "as it was"


def test_logits_are_those_of_the_whole_model(llm, tokens):
    check_logits(llm.model, tokens)


def test_what_follows_the_lm_head_is_done_too(tokens):
    """A soft cap that cuts, a scale, a mixture of experts with its routers' outputs, and a model
    whose `base_model` is the whole of it."""
    torch.manual_seed(0)
    small = MODERN | {"num_key_value_heads": 1}
    for config, differs in (
        (transformers.Gemma2Config(**small, head_dim=12, final_logit_softcapping=0.5), True),
        (transformers.CohereConfig(**small, logit_scale=0.25), True),
        (transformers.MixtralConfig(**small, num_local_experts=2), False),
        (transformers.Llama4TextConfig(**small, head_dim=12, num_local_experts=2), False),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        check_logits(model, tokens)
        with torch.no_grad():
            hidden = run_body(model, tokens).last_hidden_state
            plain = model.get_output_embeddings()(hidden)
            whole = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(plain, whole) is not differs


def test_a_model_whose_head_cannot_be_told_is_refused(tiny, tokens):
    class Other(nn.Module):
        def __init__(self, llm):
            super().__init__()
            self.base_model, self.inner, self.config = llm.base_model, llm, llm.config
            self.get_decoder = lambda: llm.base_model

        def forward(self, input_ids, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(logits=input_ids[..., None])

    model = Other(tiny("llama").model)
    output = run_body(model, tokens)
    with pytest.raises(UserError, match="cannot tell the LM head of Other"):
        compute_logits(model, output, output.last_hidden_state[0])
    assert "forward" not in vars(model.base_model)
