"""A tiny LLM whose tokens are bytes."""

import pytest
from tiny_llm import make_byte_llama

from sae_lightning.llm.load import LLM


@pytest.fixture(scope="session")
def llm(tokenizer):
    model = make_byte_llama(16)
    return LLM(model=model, tokenizer=tokenizer, name="tiny")
