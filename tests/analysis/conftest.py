"""An SAE at its place in a tiny LLM, and text for both."""

import pyarrow as pa
import pytest
import torch
from subjects import make_subject

from sae_lightning.stream.indexed_tokens import IndexedTokens
from sae_lightning.stream.packing import Packing

CONTEXT = 12


@pytest.fixture
def subject(tiny):
    """A random ReLU SAE of 32 features behind block 1 of a tiny llama."""
    return make_subject(tiny("llama"))


@pytest.fixture
def words():
    """words(n) -> text of n random tokens, as training reads it."""

    def source(n: int, seed: int = 0) -> IndexedTokens:
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(2, 100, (n,), generator=random, dtype=torch.int32)
        return IndexedTokens(pa.chunked_array([tokens.numpy()]), Packing(CONTEXT, 0, 1), seed=0)

    return source
