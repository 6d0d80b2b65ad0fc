"""Fixtures for whole tiny runs."""

import pytest
from tiny_run import tiny_job, write_text


@pytest.fixture
def job(tiny_folder, tmp_path):
    """job(name, **groups) -> a job of 40 updates in a folder of that name."""
    (tmp_path / "text").mkdir()
    text = write_text(tmp_path / "text")

    def make(name: str, **changes):
        return tiny_job(tiny_folder("llama"), text, tmp_path / name, **changes)

    return make
