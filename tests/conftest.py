"""Tests run offline, on files that they write or that the package contains."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import pytest
import torch

if not torch.cuda.is_available():
    # read at the first import of triton, which transformers does
    os.environ["TRITON_INTERPRET"] = "1"

from small_text import BOS, SEPARATOR, byte_tokenizer
from tiny_llm import save_tiny

from sae_lightning.llm.load import Dtype, LLMConfig, load_llm

# a fifth of the time it takes to compose a config: the libraries' objects are never garbage
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def one_thread():
    """One torch thread: synchronising threads would take longer than these models' arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family) -> the folder of that family's tiny model."""
    folders = {}

    def folder(family: str) -> str:
        if family not in folders:
            folders[family] = save_tiny(family, str(tmp_path_factory.mktemp(family)))
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """tiny(family) -> LLM in float32."""
    llms = {}

    def llm(family: str):
        if family not in llms:
            config = LLMConfig(name=tiny_folder(family), dtype=Dtype.float32, device="cpu")
            llms[family] = load_llm(config)
        return llms[family]

    return llm


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder for each test, instead of the user's."""
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = byte_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, SEPARATOR)
    return tokenizer
