"""A tiny LLM whose tokens are bytes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lightning.llm.load import LLM


@pytest.fixture(scope="session")
def llm(tokenizer):
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LLM(model=model, tokenizer=tokenizer, name="tiny")
