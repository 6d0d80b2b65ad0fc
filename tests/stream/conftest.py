"""A tiny LLM, and a cache folder of its own for every test."""

import datasets
import pytest
import torch
from small_text import BOS, SEPARATOR, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lightning.llm.load import LLM


@pytest.fixture(scope="session")
def tokenizer():
    made = byte_tokenizer()
    assert (made.bos_token_id, made.eos_token_id) == (BOS, SEPARATOR)
    return made


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of these tests lands in the user's cache, and no test finds another's files."""
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
