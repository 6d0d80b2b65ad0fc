"""Whole runs with the activation cache: the SAE is the one that the LLM alone would have given."""

import gc
import json
import shutil
from dataclasses import replace

import lightning as L
import pytest

from sae_lightning import run
from sae_lightning.config import read_job
from sae_lightning.export import WEIGHTS
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.stream import rows
from sae_lightning.training.settings import EvalConfig

pytestmark = pytest.mark.slow


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
    """A 1 for every pass of the LLM in training."""
    passes, capture = [], rows.capture
    monkeypatch.setattr(rows, "capture", lambda *args: passes.append(1) or capture(*args))
    return passes


def weights(job):
    return (job.folder / "sae" / WEIGHTS).read_bytes()


def metrics(job):
    return json.loads((job.folder / "metrics.json").read_text())


def test_a_cached_run_ends_with_the_weights_of_a_live_one_and_without_the_llm(made, calls):
    live, writing, reading = made("live", cached=False), made("writing"), made("reading")
    run.run([live])
    passes = len(calls)
    run.run([writing])
    assert len(calls) == 2 * passes > 0
    run.run([reading])
    assert len(calls) == 2 * passes
    assert weights(live) == weights(writing) == weights(reading)
    assert metrics(live)["held_out"] == metrics(reading)["held_out"]
    assert metrics(live)["training"] == metrics(reading)["training"]
    assert metrics(reading)["speed"]["llm_share"] == 0
    other = made("other", layer=LayerConfig(index=0))
    run.run([other])
    assert len(calls) == 3 * passes, "another layer is not there yet"


@pytest.mark.parametrize("deleted", [False, True])
def test_a_killed_caching_run_resumes_exactly(made, calls, monkeypatch, tmp_path, deleted):
    live, killed = made("live", cached=False), made("killed")
    run.run([live])

    class PowerCut(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 27:
                raise SystemError("power cut")

    with monkeypatch.context() as patch:
        standard = run.standard
        patch.setattr(run, "standard", lambda *args: [PowerCut(), *standard(*args)])
        with pytest.raises(SystemError):
            run.run([killed])
    gc.collect()  # as the end of a process would: the lock is lifted
    if deleted:
        shutil.rmtree(tmp_path / "activations")
    again = read_job(killed.folder)
    again.resumed = True
    run.run([again])
    assert weights(live) == weights(killed)
    passes = len(calls)
    run.run([made("after", eval=EvalConfig(every=10**9, tokens=150))])
    assert (len(calls) > passes) == deleted, "what was there at a checkpoint stays there"
    passes = len(calls)
    run.run([made("last")])
    assert len(calls) == passes
    assert weights(live) == weights(made("last"))
