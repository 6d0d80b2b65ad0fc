"""Generation with an activation replaced: cached as uncached, BOS untouched; answers."""

import math
from types import SimpleNamespace

import pytest
import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.generate import (
    Sampling,
    _make_processors,
    compute_surprisal,
    encode_prompt,
    generate,
    reply,
)
from sae_lightning.llm.load import LLMConfig, load_llm
from sae_lightning.llm.sites import Kind, Site, SitePair

PROMPT = torch.tensor([0, 5, 17, 30])
RESID = SitePair(Site(1, Kind.resid), Site(1, Kind.resid))
EVERYWHERE = [SitePair(Site(1, kind), Site(1, kind)) for kind in Kind]
EVERYWHERE.append(SitePair(Site(1, Kind.mlp_in), Site(1, Kind.mlp)))
FREE = Sampling(temperature=1.0, seed=3)
TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"


def same(x, y):
    return y


def shifted(x, y):
    return y + torch.linspace(-2, 2, 24)


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def texts(found) -> list[list[int]]:
    return [ids.tolist() for ids in found]


def test_with_nothing_replaced_it_is_the_likeliest_continuation(llm):
    (found,) = generate(llm, PROMPT, 6, RESID, same, 1)
    ids = PROMPT[None]
    for _ in range(6):
        logits = llm.model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    written = ids[0].tolist()
    assert found.tolist() == (written[: written.index(1)] if 1 in written else written)


@pytest.mark.parametrize("sites", EVERYWHERE, ids=str)
def test_the_cache_changes_nothing(llm, sites):
    def function(x, y):
        return 0.5 * y + 0.3 * x.flip(-1)

    cached, uncached = (
        texts(generate(llm, PROMPT, 6, sites, function, 2, FREE, cache)) for cache in (True, False)
    )
    assert cached == uncached
    plain = texts(generate(llm, PROMPT, 6, sites, same, 2, FREE))
    assert cached[0] == cached[1]
    assert len(PROMPT) < len(plain[0]) <= len(PROMPT) + 6


def test_every_token_but_bos_is_replaced_once(tiny):
    """y is what is in the model before; ending the text at BOS would show the change."""
    seen = []

    def record(x, y):
        seen.append(y.shape)
        return torch.full_like(y, math.nan) if len(seen) == 1 else y

    llm = tiny("llama")
    generate(llm, PROMPT, 4, RESID, record, 3)
    assert seen == [(3, 4, 24), *[(3, 1, 24)] * (len(seen) - 1)]

    kept = []
    later = llm.model.model.layers[2].register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    generate(llm, PROMPT, 2, RESID, lambda x, y: torch.full_like(y, 7), 1)
    later.remove()
    assert (kept[0][0, 1:] == 7).all()
    assert not (kept[0][0, 0] == 7).any()
    assert (kept[1] == 7).all()


def test_sequences_share_their_random_numbers(tiny):
    llm = tiny("llama")

    def second_only(x, y):
        return torch.cat([y[:1], shifted(x[1:], y[1:])])

    alone = texts(generate(llm, PROMPT, 12, RESID, same, 1, FREE))
    both = texts(generate(llm, PROMPT, 12, RESID, second_only, 2, FREE))
    assert both[0] == alone[0] != both[1]
    others = {
        tuple(generate(llm, PROMPT, 12, RESID, same, 1, FREE._replace(seed=s))[0].tolist())
        for s in range(5)
    }
    assert len(others) > 1


def test_samples_have_the_probabilities_of_the_model():
    """With 500 seeds, each share is within four standard errors of softmax(logits / 2)."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]])
    expected = (logits[0] / 2).softmax(0)
    chosen = []
    for seed in range(500):
        scores = logits
        for step in _make_processors(Sampling(temperature=2.0, seed=seed)):
            scores = step(PROMPT[None], scores)
        chosen.append(scores.argmax().item())
    share = torch.bincount(torch.tensor(chosen), minlength=4) / 500
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 500).sqrt()).all()


def test_top_p_leaves_the_likeliest(tiny):
    llm = tiny("llama")
    greedy = texts(generate(llm, PROMPT, 8, RESID, same, 1))
    narrow = Sampling(temperature=1.0, top_p=1e-6)
    assert texts(generate(llm, PROMPT, 8, RESID, same, 1, narrow)) == greedy


def test_a_sequence_ends_before_its_separator(tiny):
    llm = tiny("llama")
    (whole,) = texts(generate(llm, PROMPT, 8, RESID, same, 1))
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=whole[6])
    llm = llm._replace(tokenizer=tokenizer)
    (cut,) = texts(generate(llm, PROMPT, 8, RESID, same, 1))
    assert cut == whole[: whole.index(whole[6], 4)]


def test_hooks_are_gone_after_an_exception(llm):
    before = hook_count(llm.model)

    def fail(x, y):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        generate(llm, PROMPT, 4, RESID, fail, 1)
    assert hook_count(llm.model) == before


def test_a_prompt_is_opened_by_bos(tiny):
    tokenizer = tiny("gpt2").tokenizer
    ids = encode_prompt(tokenizer, "the fox", 4, None).tolist()
    assert ids == [0, *tokenizer.encode("the fox")]


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 4, "prompt=: empty; give the words that the text begins with"),
        ("fox " * 40, 4, r"prompt: its \d+ tokens and tokens=4 new ones are more than the 31 that"),
        ("fox", 30, r"prompt: its 2 tokens and tokens=30 new"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(tiny, prompt, tokens, message):
    with pytest.raises(UserError, match=f"^{message}"):
        encode_prompt(tiny("llama").tokenizer, prompt, tokens, 32)


def test_surprise_is_the_models_own_loss(llm):
    ids = torch.tensor([0, 5, 17, 30, 8])
    loss = llm.model(input_ids=ids[None], labels=ids[None]).loss.item()
    assert math.isclose(compute_surprisal(llm.model, ids).mean().item(), loss, rel_tol=1e-5)


def test_the_answer_is_what_greedy_generation_adds(tiny):
    llm = tiny("llama")
    found = reply(llm, "the dog", 5)
    ids = llm.tokenizer("the dog\n\nAnswer:", return_tensors="pt")["input_ids"]
    expected = []
    for _ in range(5):
        token = llm.model(input_ids=ids).logits[0, -1].argmax()
        expected.append(int(token))
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if int(token) == llm.tokenizer.eos_token_id:
            break
    text = llm.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert found == (text, ids.shape[1] - len(expected), len(expected))
    assert reply(llm, "the dog", 5) == found


def test_a_chat_model_is_asked_in_its_format(tiny, monkeypatch):
    llm = tiny("llama")
    monkeypatch.setattr(llm.tokenizer, "chat_template", TEMPLATE)
    asked = llm.tokenizer("<bos>the dog", add_special_tokens=False)["input_ids"]
    assert reply(llm, "the dog", 2).tokens_in == len(asked)


def test_a_chat_template_that_fails_is_one_line(tiny, monkeypatch):
    llm = tiny("llama")
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"^explainer=.*: its chat template fails \(no\); use "):
        reply(llm, "the dog", 4)


def test_a_question_that_does_not_fit_is_one_line(tiny):
    llm = tiny("gpt2")  # 32 positions
    with pytest.raises(UserError, match=r"takes 32 tokens, and a question of .* is longer"):
        reply(llm, "the lazy dog " * 10, 5)


@pytest.mark.slow
def test_the_packaged_model_answers():
    llm = load_llm(LLMConfig(name="smollm2", device="cpu"))
    assert "Paris" in reply(llm, "What is the capital of France?", 20).text
