"""Fixtures for whole tiny runs."""

import pytest
from tiny_run import tiny_job, write_text


@pytest.fixture
def job(tiny_folder, tmp_path):
    """job(name, **groups) -> a job of 40 updates in a folder of that name."""
    return _jobs_in(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def common_job(tiny_folder, tmp_path_factory):
    """As `job`, for runs that several tests of a file compare theirs with."""
    return _jobs_in(tmp_path_factory.mktemp("common"), tiny_folder)


def _jobs_in(folder, tiny_folder):
    (folder / "text").mkdir()
    text = write_text(folder / "text")

    def make(name: str, **changes):
        return tiny_job(tiny_folder("llama"), text, folder / name, **changes)

    return make
