"""Whole tiny runs."""

import datasets
import pytest
from tiny_run import tiny_job, write_text


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tokens of these runs stay out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def job(tiny_folder, tmp_path):
    """job(name, **groups) -> a job of 40 updates in a folder of that name."""
    (tmp_path / "text").mkdir()
    text = write_text(tmp_path / "text")

    def make(name: str, **changes):
        return tiny_job(tiny_folder("llama"), text, tmp_path / name, **changes)

    return make
