"""Tests run offline: whatever a test needs, it builds on disk or the packaged files hold."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import pytest
import torch

if not torch.cuda.is_available():
    # read where triton is first imported, which transformers does
    os.environ["TRITON_INTERPRET"] = "1"

from small_text import BOS, SEPARATOR, byte_tokenizer
from tiny_llm import save_tiny

from sae_lightning.llm.load import Dtype, LLMConfig, load_llm


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another take far longer than these models' arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family) -> the folder of that family's tiny model."""
    made = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = save_tiny(family, str(tmp_path_factory.mktemp(family)))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """tiny(family) -> LLM in float32."""
    made = {}

    def llm(family: str):
        if family not in made:
            config = LLMConfig(name=tiny_folder(family), dtype=Dtype.float32, device="cpu")
            made[family] = load_llm(config)
        return made[family]

    return llm


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of these tests lands in the user's cache, and no test finds another's files."""
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    made = byte_tokenizer()
    assert (made.bos_token_id, made.eos_token_id) == (BOS, SEPARATOR)
    return made
