"""Fixtures of the LLM tests: tiny LLMs of several families, and tokens."""

import pytest
import torch
from tiny_llm import FAMILIES


@pytest.fixture(params=FAMILIES)
def llm(request, tiny):
    """One tiny LLM of every family in turn."""
    return tiny(request.param)


@pytest.fixture
def tokens():
    """Four sequences of ten tokens, each opened by BOS; the rest are text."""
    ids = torch.randint(2, 60, (4, 10), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    return ids
