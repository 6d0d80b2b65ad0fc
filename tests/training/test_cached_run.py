"""Whole runs with the activation cache end with the same SAE as runs without it."""

import os
import shutil
from dataclasses import replace

import lightning as L
import pytest
from test_run import metrics, weights

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs import checks, passes, run
from sae_lightning.runs.jobs import read_job
from sae_lightning.stream import cache, rows
from sae_lightning.stream import text_source as text
from sae_lightning.training.settings import EvalConfig


@pytest.fixture
def made(job, tmp_path):
    """made(name) -> a job; with cached=True one that uses the cache in `tmp_path`."""

    def make(name, cached=True, **changes):
        one = job(name, **changes)
        if cached:
            data = replace(one.config.data, cache=True, cache_folder=str(tmp_path / "activations"))
            one.config = replace(one.config, data=data)
        return one

    return make


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every pass of the LLM in training."""
    llm_passes, capture = [], rows.capture
    monkeypatch.setattr(rows, "capture", lambda *args: llm_passes.append(1) or capture(*args))
    return llm_passes


@pytest.mark.slow
def test_a_cached_run_ends_with_the_weights_of_a_live_one_and_without_the_llm(made, calls):
    live, writing, reading = made("live", cached=False), made("writing"), made("reading")
    passes.train_jobs([live])
    llm_passes = len(calls)
    passes.train_jobs([writing])
    assert len(calls) == 2 * llm_passes > 0
    passes.train_jobs([reading])
    assert len(calls) == 2 * llm_passes
    assert weights(live.folder) == weights(writing.folder) == weights(reading.folder)
    assert metrics(live.folder)["held_out"] == metrics(reading.folder)["held_out"]
    assert metrics(live.folder)["training"] == metrics(reading.folder)["training"]
    assert metrics(reading.folder)["speed"]["llm_share"] == 0
    other = made("other", layer=LayerConfig(index=0))
    passes.train_jobs([other])
    assert len(calls) == 3 * llm_passes, "another layer is not there yet"


@pytest.fixture
def failing(monkeypatch):
    """failing(job) -> the error, with its traceback, of its run that fails at update 27."""

    class PowerCut(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 27:
                raise SystemError("power cut")

    def fail(job):
        with monkeypatch.context() as patch:
            make_callbacks = run.make_callbacks
            patch.setattr(run, "make_callbacks", lambda *args: [PowerCut(), *make_callbacks(*args)])
            with pytest.raises(SystemError) as error:
                passes.train_jobs([job])
        return error

    return fail


@pytest.mark.slow
def test_a_run_that_failed_leaves_the_cache_to_the_next_one_of_its_process(
    made, calls, failing, capsys, tmp_path
):
    error = failing(made("failed"))
    assert error.tb, "which holds all that the run was made of"
    assert list(tmp_path.glob("activations/*/.*.tmp")) == []
    capsys.readouterr()
    passes.train_jobs([made("next")])
    assert "another process" not in capsys.readouterr().out
    llm_passes = len(calls)
    passes.train_jobs([made("last")])
    assert len(calls) == llm_passes


def test_a_cache_that_cannot_be_is_refused_before_the_llm_is_loaded(made, tmp_path, monkeypatch):
    monkeypatch.delattr(text, "load_llm")
    folder = tmp_path / "activations"
    folder.touch()
    with pytest.raises(UserError, match="data.cache_folder=.*/activations cannot be written to"):
        passes.train_jobs([made("run")])
    resumed = made("resumed")
    resumed.resumed = True
    checks.check_jobs([resumed])
    folder.unlink()
    checks.check_jobs([made("new")])
    assert not folder.exists()


def test_a_cache_that_can_only_be_read_is_taken_if_there_is_anything_in_it(
    made, tmp_path, monkeypatch
):
    folder, job = tmp_path / "activations", made("run")
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder or mode == os.R_OK)
    with pytest.raises(UserError, match="cannot be written to"):
        checks.check_jobs([job])
    (folder / "key").mkdir()
    checks.check_jobs([job])


@pytest.mark.slow
def test_a_run_that_a_sweep_or_a_user_takes_up_needs_no_space_for_its_cache(made, monkeypatch):
    monkeypatch.setattr(cache, "read_free_space", lambda folder: 0)
    with pytest.raises(UserError, match="data.cache: no space"):
        passes.train_jobs([made("new")])
    taken_up = made("taken up")
    taken_up.resumed = True  # and has no checkpoint yet
    passes.train_jobs([taken_up])
    assert metrics(taken_up.folder)["tokens"] > 0


def test_jobs_of_one_pass_have_one_cache(made):
    for other in (made("live", cached=False), made("elsewhere")):
        if other.config.data.cache:
            other.config.data.cache_folder += "2"
        with pytest.raises(UserError, match="share its cache; give all of them the same"):
            checks.check_jobs([made("cached"), other])


@pytest.mark.slow
@pytest.mark.parametrize("deleted", [False, True])
def test_a_killed_caching_run_resumes_exactly(made, calls, failing, tmp_path, deleted):
    live, killed = made("live", cached=False), made("killed")
    passes.train_jobs([live])
    failing(killed)
    if deleted:
        shutil.rmtree(tmp_path / "activations")
    again = read_job(killed.folder)
    again.resumed = True
    passes.train_jobs([again])
    assert weights(live.folder) == weights(killed.folder)
    llm_passes = len(calls)
    passes.train_jobs([made("after", eval=EvalConfig(every=10**9, tokens=150))])
    assert (len(calls) > llm_passes) == deleted, "what was there at a checkpoint stays there"
    llm_passes = len(calls)
    passes.train_jobs([made("last")])
    assert len(calls) == llm_passes
    assert weights(live.folder) == weights(made("last").folder)
