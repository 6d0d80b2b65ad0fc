"""`trainer.keep_every`: SAEs that are kept while training goes on."""

from dataclasses import replace

import pytest
import torch
from test_run import stop_after
from tiny_run import WORLD_BATCH as BATCH
from tiny_run import synthetic_job

from sae_lightning import load_sae
from sae_lightning.analysis.subject import open_subject
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs import checks, passes
from sae_lightning.runs.jobs import read_job
from sae_lightning.sae.relu import ReLULoss

KEPT = ["sae-3840", "sae-7680"]  # of 60 updates of 128 tokens, every 30


@pytest.fixture
def job(tmp_path):
    """job(name, **groups) -> a job of 60 updates on 32 concepts in 16 dimensions."""
    return lambda name, **changes: synthetic_job(tmp_path / name, **changes)


def keep(job, every):
    job.config.trainer = replace(job.config.trainer, keep_every=every)
    return job


def read_weights(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob(f"sae*/{WEIGHTS}")}


@pytest.mark.slow
def test_a_run_keeps_the_sae_that_it_had_after_so_many_tokens(job, monkeypatch):
    whole, plain, stopped = keep(job("whole"), 30 * BATCH), job("plain"), job("stopped")
    passes.train_jobs([whole])
    passes.train_jobs([plain])
    stop_after(monkeypatch, 30, stopped)  # saves its SAE
    kept = read_weights(whole.folder)
    assert kept == {
        "sae-3840": read_weights(stopped.folder)["sae"],
        "sae-7680": read_weights(plain.folder)["sae"],
        "sae": read_weights(plain.folder)["sae"],
    }


@pytest.mark.slow
def test_each_head_keeps_its_own_and_names_the_tokens_of_its_update(job, tmp_path):
    losses = {"a": ReLULoss(l1=1e-3), "b": ReLULoss(l1=1e-1)}
    # 60 updates reach 5000 tokens with the 40th, which ends at 5120
    jobs = [keep(job(f"sweep/{name}", loss=loss), 5000) for name, loss in losses.items()]
    passes.train_jobs([replace(each, sweep_folder=tmp_path / "sweep") for each in jobs])
    kept = [read_weights(each.folder) for each in jobs]
    assert [sorted(each) for each in kept] == [["sae", "sae-5120"]] * 2
    assert kept[0]["sae-5120"] != kept[1]["sae-5120"]


@pytest.mark.slow
def test_a_resumed_run_completes_what_it_keeps_and_may_begin_to_keep(job, monkeypatch):
    whole, stopped, late = (keep(job(n), 30 * BATCH) for n in ("whole", "stopped", "late"))
    passes.train_jobs([whole])
    stop_after(monkeypatch, 35, stopped)
    assert sorted(read_weights(stopped.folder)) == ["sae", KEPT[0]]
    passes.train_jobs([replace(read_job(stopped.folder), resumed=True)])
    assert read_weights(stopped.folder) == read_weights(whole.folder)
    stop_after(monkeypatch, 35, keep(late, None))
    passes.train_jobs([replace(keep(read_job(late.folder), 30 * BATCH), resumed=True)])
    assert sorted(read_weights(late.folder)) == ["sae", KEPT[1]]


def test_a_kept_sae_opens_with_the_runs_config_and_has_results_of_its_own(job):
    whole = keep(job("whole"), 30 * BATCH)
    passes.train_jobs([whole])
    kept, last = (open_subject(str(whole.folder / name), {}) for name in (KEPT[0], "sae"))
    assert kept.config.to_dict() == last.config.to_dict()
    assert torch.equal(kept.sae.W_dec, load_sae(whole.folder / KEPT[0]).W_dec)
    assert not torch.equal(kept.sae.W_dec, last.sae.W_dec)
    assert kept.results_folder == whole.folder / KEPT[0] / "analysis"
    assert last.results_folder == whole.folder / "analysis"


def test_the_space_that_kept_saes_need_is_counted(job):
    """48 features of width 16: 4 (2 x 48 x 16 + 48 + 16) B of weights."""
    weights, shape = 4 * (2 * 48 * 16 + 48 + 16), LLMShape(1, 16, None, 0)
    pair = LayerConfig(index=0).resolve_sites(1)
    none = checks._count_checkpoint_bytes(job("none"), pair, shape)
    two = keep(job("two"), 30 * BATCH)
    assert none == 8 * weights
    assert checks._count_checkpoint_bytes(two, pair, shape) == none + 2 * weights
    (two.folder / KEPT[0]).mkdir(parents=True)
    (two.folder / KEPT[0] / WEIGHTS).write_bytes(b"." * weights)
    assert checks._count_checkpoint_bytes(two, pair, shape) == none + weights
    assert keep(job("most"), 1).config.trainer.kept_saes == 60  # one for each update at most
