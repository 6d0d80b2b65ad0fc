"""A local model is asked in its own format and answers the same each time."""

import pytest
import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.generate import reply

TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"


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


def test_a_question_that_does_not_fit_is_one_line(tiny):
    llm = tiny("gpt2")  # 32 positions
    with pytest.raises(UserError, match=r"takes 32 tokens, and a question of .* is longer"):
        reply(llm, "the lazy dog " * 10, 5)


@pytest.mark.slow
def test_the_packaged_model_answers():
    from sae_lightning.llm.load import LLMConfig, load

    llm = load(LLMConfig(name="smollm2", device="cpu"))
    assert "Paris" in reply(llm, "What is the capital of France?", 20).text
