"""Runs on activations in files: what they leave behind, that they resume exactly, and analysis."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from on_ranks import train_on_ranks
from safetensors.torch import save_file
from test_run import metrics, stop_after, weights
from tiny_run import WORLD_BATCH, synthetic_job

from sae_lightning import UserError, load_sae
from sae_lightning.analysis.evaluate import EvaluateTask, score_subject
from sae_lightning.analysis.overview import OverviewTask
from sae_lightning.analysis.subject import open_subject
from sae_lightning.analysis.survey.features_task import FeaturesTask
from sae_lightning.formats.saelens import CFG
from sae_lightning.llm.load import Dtype, LLMConfig
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs import passes
from sae_lightning.runs.folders import read_sweep_runs
from sae_lightning.runs.jobs import Job, read_job
from sae_lightning.runs.search import SweepConfig
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.topk import TopKConfig
from sae_lightning.stream.activations import ActivationsConfig
from sae_lightning.stream.concepts import make_concept_world
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.training.settings import (
    EvalConfig,
    Splitting,
)

ROWS = 3000
TRANSCODER = LayerConfig(index=4, source=Kind.mlp_in, target=Kind.mlp)


@pytest.fixture
def files(tmp_path):
    """Known concepts in 16 dimensions, of which mlp.4 [n, 24] is a linear map."""
    world = make_concept_world(concepts=32, dim=16, l0=2.0)
    x, _ = world.sample(ROWS, torch.Generator().manual_seed(1))
    y = x @ torch.randn(16, 24, generator=torch.Generator().manual_seed(2)) / 4
    (tmp_path / "acts").mkdir()
    save_file({"mlp_in.4": x, "mlp.4": y}, tmp_path / "acts" / "a.safetensors")
    np.save(tmp_path / "x.npy", x.numpy())
    return tmp_path / "acts"


@pytest.fixture
def job(files, tmp_path):
    """job(name, **groups) -> a job of 60 updates on mlp_in.4, nearly three epochs."""

    def make(name: str, **changes) -> Job:
        groups = {
            "data": ActivationsConfig(path=str(files), pool=1024, held_out=0.1),
            "eval": EvalConfig(every=20 * WORLD_BATCH, tokens=200),
            "layer": LayerConfig(index=4, source=Kind.mlp_in),
            "sweep": SweepConfig(),
        }
        return synthetic_job(tmp_path / name, **(groups | changes))

    return make


def settings() -> dict:
    return {"llm": None, "data": PlaysConfig(), "layer": LayerConfig(index=0), "seed": 0}


def test_a_run_is_scored_on_held_out_rows_without_an_llm(job, capsys):
    this = job("run")
    (held_out,) = passes.train_jobs([this])
    said = " ".join(capsys.readouterr().out.split())  # a long path can break any line
    names = {"l0", "explained_variance", "unfired", "duplicates", "nearest_cosine"}
    assert names <= set(held_out)
    assert not [name for name in held_out if "ce" in name.split("_") or name == "kl"]
    assert all(math.isfinite(value) for value in held_out.values())
    assert held_out["explained_variance"] > 0.5
    assert "2,700 rows to train on, 300 held out, float32" in said
    assert "mlp_in.4, d = 16" in said and "on held-out rows" in said
    assert "ran out after 2,700 rows; going round again in a new order (epoch 3)" in said
    assert "LLM" not in said and "CE" not in said


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(job, monkeypatch):
    whole, stopped = job("whole"), job("stopped")
    passes.train_jobs([whole])

    stop_after(monkeypatch, 37, stopped)
    passes.train_jobs([replace(read_job(stopped.folder), resumed=True)])
    assert weights(whole.folder) == weights(stopped.folder)
    assert metrics(whole.folder)["held_out"] == metrics(stopped.folder)["held_out"]


@pytest.mark.slow
def test_runs_at_different_sites_that_were_stopped_go_on_together(job, tmp_path, monkeypatch):
    """The stream of each has the checksums of the files at its own sites."""
    jobs = [job("a"), job("b", layer=replace(TRANSCODER, source=Kind.mlp))]
    for each in jobs:
        stop_after(monkeypatch, 20, each)
    both = [replace(read_job(each.folder), resumed=True, multirun=True) for each in jobs]
    passes.train_jobs(both)
    whole = job("whole")
    passes.train_jobs([whole])
    assert weights(jobs[0].folder) == weights(whole.folder)
    assert metrics(jobs[1].folder)["speed"]["heads"] == 2


@pytest.mark.slow
def test_a_sweep_over_sites_of_different_widths_trains_each_sae_as_if_it_were_alone(
    job, tmp_path, capsys
):
    topk = {"model": TopKConfig(name="topk", features=48, k=3, skip=True), "loss": AuxKLoss()}
    groups = {"sae": {}, "transcoder": {"layer": TRANSCODER} | topk}
    sweep = {"sweep_folder": tmp_path / "sweep", "multirun": True}
    jobs = [
        replace(job(f"sweep/{name}", **group), overrides=[f"+n={name}"], **sweep)
        for name, group in groups.items()
    ]
    passes.train_jobs(jobs)
    assert "(1 SAE at a time)" not in capsys.readouterr().out
    for name, group in groups.items():
        alone = job(name, **group)
        passes.train_jobs([alone])
        assert weights(alone.folder) == weights(tmp_path / "sweep" / name)
    sae = load_sae(tmp_path / "transcoder")
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((16, 48), (48, 24))
    cfg = json.loads((tmp_path / "transcoder" / "sae" / CFG).read_text())
    assert (cfg["d_in"], cfg["d_out"]) == (16, 24)
    named = [cfg["metadata"][key] for key in ("hook_name", "hook_name_out", "dataset_path")]
    assert named == ["mlp_in.4", "mlp.4", str(tmp_path / "acts")]
    capsys.readouterr()
    write_report(tmp_path / "sweep", read_sweep_runs(tmp_path / "sweep"))
    page = (tmp_path / "sweep" / "sweep.html").read_text("utf8")
    assert "acts" in page and "Shakespeare" not in page


@pytest.mark.slow
def test_analysis_does_what_needs_no_text_and_says_so_of_the_rest(job, tmp_path, capsys):
    this = job("run", layer=TRANSCODER)
    (trained,) = passes.train_jobs([this])
    subject = open_subject(str(this.folder), settings())
    assert score_subject(subject).card.scalars() == pytest.approx(trained, rel=1e-3)
    given = settings() | {"llm": this.config.llm, "run": str(this.folder)}
    for task, name in ((EvaluateTask, "evaluate"), (OverviewTask, "overview")):
        capsys.readouterr()
        task(task=name, **given).execute([])
        said = capsys.readouterr().out
        assert "on held-out rows" in said and "text" not in said
        assert "explained_variance" in (this.folder / f"analysis/{name}.json").read_text()
    message = r"was trained on activations from files and names no LLM: only task=evaluate"
    with pytest.raises(UserError, match=message):
        FeaturesTask(task="features", **given).execute([])


@pytest.mark.slow
def test_analysis_can_be_told_the_llm_that_the_activations_come_from(job, tiny_folder, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 24)).astype("f4"))
    data = ActivationsConfig(path=str(tmp_path / "x.npy"), pool=256)
    this = job("run", data=data, layer=LayerConfig(index=0))
    passes.train_jobs([this])
    llm = LLMConfig(name=tiny_folder("llama"), dtype=Dtype.float32, device="cpu")
    told = settings() | {"llm": llm, "data": PlaysConfig(context=16)}
    subject = open_subject(str(this.folder), told, ["llm", "data"])
    assert subject.heading.endswith("resid.0: 48 relu features")
    assert subject.heading.startswith(Path(llm.name).name)
    with pytest.raises(UserError, match=r"^llm\.name=.* has no meaning with data=activations"):
        open_subject(str(this.folder), told, ["llm"])


def test_mistakes_are_refused_before_anything_starts(job, files, tmp_path):
    x = np.load(tmp_path / "x.npy")
    for message, changes in (
        (r"^eval\.loss_tokens=8 has no meaning with data=activations", {}),
        (r"^layer\.index=3: .* has no resid\.3; there are mlp_in\.4, mlp\.4", {"layer": 3}),
        (r"3,000 rows, of which data\.held_out=0\.99 leaves 30 to train", {"held_out": 0.99}),
    ):
        this = job("run")
        if "layer" in changes:
            this.config.layer = LayerConfig(index=3)
        elif changes:
            this.config.data = replace(this.config.data, **changes)
        else:
            this = replace(this, overrides=["eval.loss_tokens=8"])
        with pytest.raises(UserError, match=message):
            passes.train_jobs([this])
        assert not list(this.folder.glob("*"))
    x[2000, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    data = ActivationsConfig(path=str(tmp_path / "x.npy"), pool=1024)
    with pytest.raises(UserError, match=r"row 2000 \(from 0\) of .*x\.npy holds NaN or infinity"):
        passes.train_jobs([job("bad", data=data, layer=LayerConfig(index=0))])


@pytest.mark.slow
def test_several_ranks_end_as_one(job, tmp_path):
    """Each SAE on a rank of its own, at a site of its own; and one SAE split over both."""
    one = {"a": job("a"), "b": job("b", layer=TRANSCODER)}
    passes.train_jobs([one["a"]])
    passes.train_jobs([one["b"]])
    lists = []
    for split in (Splitting.none, Splitting.all):
        sweep = {"sweep_folder": tmp_path / split.name, "multirun": True}
        layers = {"a": {}, "b": {"layer": TRANSCODER}}
        jobs = [replace(job(f"{split.name}/{n}", **g), **sweep) for n, g in layers.items()]
        for this in jobs:
            this.config.trainer = replace(this.config.trainer, devices=2, split=split)
        lists.append(jobs)
    train_on_ranks(*lists)
    for name, alone in one.items():
        assert weights(alone.folder) == weights(tmp_path / "none" / name)
        whole, split = (load_sae(folder) for folder in (alone.folder, tmp_path / "all" / name))
        torch.testing.assert_close(split.W_dec, whole.W_dec, rtol=1e-3, atol=1e-3)
