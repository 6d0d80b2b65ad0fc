"""Tests run offline, on files that they write or that the package contains.

Libraries are imported where they are used: the process in which pytest-xdist hands out tests needs
none of them.
"""

import gc
import os
from functools import cache

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
gc.set_threshold(50_000, 20, 20)
# They take longest, so they begin first: no process is left with one of them at the end.
LONG_FILES = ("test_devices", "test_sweepers", "test_synthetic_run", "test_claims")
CACHES = ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")


def pytest_collectstart():
    """Prepare a process that runs tests, before their modules are imported."""
    prepare_process()


@cache
def prepare_process():
    import torch

    if not torch.cuda.is_available():
        # read at the first import of triton, which transformers does
        os.environ["TRITON_INTERPRET"] = "1"
    # synchronising threads would take longer than these models' arithmetic
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


def pytest_collection_finish():
    """Make garbage collection, which every pass of training does, skip what has been imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Undo what a run has chosen."""
    import torch

    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family) -> the folder of that family's tiny model."""
    from tiny_llm import save_tiny

    folders = {}

    def folder(family: str) -> str:
        if family not in folders:
            folders[family] = save_tiny(family, str(tmp_path_factory.mktemp(family)))
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """tiny(family) -> LLM in float32."""
    from sae_lightning.llm.load import Dtype, LLMConfig, load_llm

    llms = {}

    def llm(family: str):
        if family not in llms:
            config = LLMConfig(name=tiny_folder(family), dtype=Dtype.float32, device="cpu")
            llms[family] = load_llm(config)
        return llms[family]

    return llm


@pytest.fixture(scope="session", autouse=True)
def common_cache(tmp_path_factory):
    """A cache folder, instead of the user's, for what several tests share."""
    import datasets

    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        for name in CACHES:
            patch.setattr(datasets.config, name, folder)
            patch.setenv(name, folder)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder for each test."""
    import datasets

    for name in CACHES:
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    from small_text import BOS, SEPARATOR, byte_tokenizer

    tokenizer = byte_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, SEPARATOR)
    return tokenizer
