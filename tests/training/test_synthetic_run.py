"""A run on known concepts: what it leaves behind, that it resumes exactly, and claim 10."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from forked import run_script
from hydra import compose, initialize_config_dir
from test_run import curves, metrics, stop_after, weights
from tiny_run import WORLD_STEPS as STEPS
from tiny_run import synthetic_job

from sae_lightning import UserError, load_sae
from sae_lightning.analysis.evaluate import evaluate
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.llm.sites import distinct_sites
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs import passes
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.folders import read_sweep_runs
from sae_lightning.runs.jobs import make_job, read_job
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.sae.controls import Control
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream.recovery import Recovery

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path):
    """job(name, **groups) -> a job of 60 updates on 32 concepts in 16 dimensions."""
    return lambda name, **changes: synthetic_job(tmp_path / name, **changes)


@pytest.mark.slow
def test_recovery_is_measured_instead_of_the_llms_loss(job, capsys):
    this = job("run")
    (held_out,) = passes.train_jobs([this])
    said = capsys.readouterr().out
    found = metrics(this.folder)["held_out"]
    assert found == held_out
    assert set(found) == {
        *("l0", "explained_variance", "unfired", "duplicates", "nearest_cosine"),
        *Recovery._fields,
    }
    assert all(math.isfinite(value) for value in found.values())
    assert 0.5 < found["mmcs"] <= 1
    drawn = curves(this.folder)
    assert len(drawn["held_out/recovered"]) == STEPS // 20
    assert not [tag for tag in drawn if "ce_" in tag or tag.endswith("kl")]
    assert "32 in 16 dimensions, 2 of them active" in said
    assert "LLM" not in said and "CE" not in said
    assert f"{found['recovered']:.1%} of concepts" in said


@pytest.mark.slow
def test_an_evaluation_of_the_saved_sae_says_the_same(job):
    this = job("run")
    (trained,) = passes.train_jobs([this])
    sites = this.config.layer.resolve_sites(1)
    held_out = read_job(this.folder).config.data_source.open_held_out(
        distinct_sites([sites]), 2000, 0
    )
    found = evaluate(load_sae(this.folder), held_out, sites)
    assert found.card.scalars() == pytest.approx(trained, rel=1e-3)
    assert found.tokens == 2000


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(job, monkeypatch):
    whole, stopped = job("whole"), job("stopped")
    passes.train_jobs([whole])

    stop_after(monkeypatch, 23, stopped)
    passes.train_jobs([replace(read_job(stopped.folder), resumed=True)])
    assert weights(whole.folder) == weights(stopped.folder)
    assert metrics(whole.folder)["held_out"] == metrics(stopped.folder)["held_out"]
    assert curves(whole.folder) == curves(stopped.folder)


@pytest.mark.slow
def test_a_sweep_shares_the_samples_and_reports_what_was_recovered(job, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    jobs = [
        replace(
            job(f"sweep/{l1}", loss=ReLULoss(l1=l1)),
            sweep_folder=sweep,
            overrides=[f"loss.l1={l1}"],
        )
        for l1 in (1e-3, 1e-2)
    ]
    alone = job("alone", loss=ReLULoss(l1=1e-2))
    passes.train_jobs([alone])
    passes.train_jobs(jobs)
    ends = [(folder / "sae" / WEIGHTS).read_bytes() for folder in (jobs[1].folder, alone.folder)]
    assert ends[0] == ends[1]
    capsys.readouterr()
    write_report(sweep, read_sweep_runs(sweep))
    said = capsys.readouterr().out
    assert "recovered" in said and "CE" not in said
    page = (sweep / "sweep.html").read_text("utf8")
    assert "Sparsity and concepts recovered" in page and "CE recovered" not in page
    assert "32 in 16 dimensions" in page and "missing from some plots" not in page


def test_the_loss_of_no_llm_cannot_be_asked_for(job):
    with pytest.raises(UserError, match=r"^eval\.loss_tokens=8 has no meaning with data=synthetic"):
        passes.train_jobs([replace(job("run"), overrides=["eval.loss_tokens=8"])])


# 256 concepts in 64 dimensions, 4 of them active
SMALL = [
    *["data=synthetic", "data.concepts=256", "data.dim=64", "data.l0=4", "data.pool=8192"],
    *["model.features=512", "trainer=cpu", "trainer.batch=256", "optim.lr=1e-2"],
    *["trainer.precision=fp32", "eval.tokens=8192"],
]
SPARSITY = {
    "relu": ["loss.l1=2e-2"],
    "topk": ["model.k=4"],
    "batch_topk": ["model.k=4"],
    "jumprelu": ["loss.l0=3e-3"],
    "gated": ["loss.l1=3e-2"],
    "matryoshka": ["model.k=4"],
}
SLOWLY = ("relu", "matryoshka")  # take twice as many tokens


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """{architecture or control: held-out metrics}; the controls are of the TopK SAE."""
    register_schemas()
    wanted = {name: [f"model={name}", *typed] for name, typed in SPARSITY.items()}
    wanted["dense"] = ["model=dense"]
    for control in Control:
        wanted[control] = [*wanted["topk"], f"model.control={control.name}"]
    base, scores = tmp_path_factory.mktemp("world"), {}
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        for tokens, slowly in ((131072, False), (262144, True)):
            names, jobs = [name for name in wanted if (name in SLOWLY) == slowly], []
            for name in names:
                typed = [*SMALL, f"trainer.tokens={tokens}", *wanted[name]]
                jobs.append(make_job(compose("config", typed), base / str(name), typed))
            sweep = {"multirun": True, "sweep_folder": base}
            metrics = passes.train_jobs([replace(job, **sweep) for job in jobs])
            scores |= dict(zip(names, metrics, strict=True))
    return scores


def test_every_architecture_that_is_sparse_has_to_recover_the_truth():
    assert set(SPARSITY) == set(ARCHITECTURES) - {"dense"}


@pytest.mark.slow
@pytest.mark.parametrize("model", SPARSITY)
def test_every_architecture_recovers_known_concepts(scores, model):
    """Claim 10. Measured: 56 % (BatchTopK) to 98 % (TopK) recovered; precision 0.50 to 0.84."""
    found = scores[model]
    assert found["recovered"] >= 0.5
    assert found["precision"] > 0.2 and found["recall"] > 0.4
    assert found["encoder_agreement"] > 0.75
    assert found["negative_bias"] > 0.9
    assert found["feature_readout"] > 3 * found["projection_readout"]


@pytest.mark.slow
def test_no_control_recovers_known_concepts(scores):
    """Measured: the frozen encoder 2 %, the others less; trained, the same SAE recovers 98 %."""
    for control in Control:
        assert scores[control]["recovered"] < 0.1, control


def test_an_sae_that_would_start_at_the_concepts_is_refused(job):
    this = replace(job("run"), overrides=["data.seed=0"])
    with pytest.raises(UserError, match=r"^data\.seed=0: an SAE with model\.seed=0 would start at"):
        passes.train_jobs([this])


@pytest.mark.slow
def test_without_sparsity_features_find_no_concept(scores):
    found = scores["dense"]
    assert found["l0"] > 256 and found["explained_variance"] > 0.99
    assert found["recovered"] < 0.05 and found["precision"] < 0.05


@pytest.mark.slow
def test_what_a_user_types_trains_and_evaluates(tmp_path):
    small = ["data.concepts=32", "data.dim=16", "data.l0=2", "model.features=96"]
    run_dir, sweep_dir = tmp_path / "run", tmp_path / "sweep"
    for command in (
        ["train.py", "data=synthetic", "trainer=smoke", *small, f"hydra.run.dir={run_dir}"],
        ["analyze.py", f"run={run_dir}"],
        [
            *["train.py", "-m", "data=synthetic", "trainer=smoke", "model=relu,topk", *small],
            f"hydra.sweep.dir={sweep_dir}",
        ],
        ["analyze.py", "task=sweep", f"run={sweep_dir}"],
    ):
        done = run_script(*command, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "recovered" in done.stdout
        assert "CE" not in done.stdout
    overview = json.loads((run_dir / "analysis" / "overview.json").read_text())
    assert overview["evaluate"]["recovered"] >= 0
    assert len(list(sweep_dir.glob("*/metrics.json"))) == 2
