"""`sweep.seeds` and `sweep.controls` add runs to a sweep, which could be typed one by one."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from sae_lightning import UserError, train, train_sweep
from sae_lightning.runs import passes
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.expansion import (
    average_objective,
    describe_expansion,
    expand_jobs,
    list_controls,
)
from sae_lightning.runs.find_controls import find_controls
from sae_lightning.runs.folders import begin_run
from sae_lightning.runs.jobs import Job, make_job, read_sweep
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.runs.sweep import Sweep
from sae_lightning.sae.controls import Control

SMALL = (
    *("data=synthetic", "data.concepts=32", "data.dim=16", "data.l0=3", "data.pool=256"),
    *("trainer=smoke", "trainer.tokens=512", "trainer.batch=64", "trainer.accelerator=cpu"),
    *("trainer.checkpoint_every=256", "eval.every=512", "eval.tokens=128", "model.features=80"),
)
WHOLE = "sweep.seeds=2", "sweep.controls=true"


@pytest.fixture
def typed():
    """typed(overrides, ...) -> the jobs of a sweep, their folders named after what varies."""
    register_schemas()
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        yield lambda *jobs: [
            make_job(compose("config", [*SMALL, *each]), Path("sweep", name), [*SMALL, *each], True)
            for name, each in jobs
        ]


def names(groups: list[list[Job]]) -> list[list[str]]:
    return [[job.folder.name for job in group] for group in groups]


def test_each_job_gets_its_seeds_and_each_seed_its_controls(typed):
    jobs = typed(("model=topk", ["model=topk", *WHOLE]), ("0", ["model.seed=7", *WHOLE]))
    groups = expand_jobs(jobs)
    for group, first, base in zip(groups, (0, 7), ("model=topk", "0"), strict=True):
        controls = [control.name for control in list_controls(group[0].config)]
        others = [name for name in controls if name != "pca"]
        assert {"frozen_decoder", "pca"} <= {*controls}
        seed = f"{base},model.seed={first + 1}"
        unique = [*dict.fromkeys(job.folder.name for job in group)]
        assert unique == [
            base,
            *(f"{base},model.control={name}" for name in controls),
            seed,
            *(f"{seed},model.control={name}" for name in others),  # pca draws nothing at random
        ]
        assert {job.config.model.seed for job in group} == {first, first + 1}
    runs = {job.folder: job for group in groups for job in group}
    saes = sum(job.config.model.control is None for job in runs.values())
    assert saes == 4
    expected = f"2 jobs become {len(runs)} runs: 4 SAEs with all seeds, {len(runs) - 4} controls"
    assert describe_expansion(groups) == expected
    assert expand_jobs([replace(job, resumed=True) for job in jobs]) == [
        [replace(job, resumed=True)] for job in jobs
    ], "its runs were added when the sweep began"


def test_an_added_run_is_the_run_that_its_overrides_describe(typed):
    (group,) = expand_jobs(typed(("x", ["model=jumprelu", "model.seed=3", *WHOLE])))
    added = group[-2]
    assert added.overrides == [
        *SMALL,
        *("model=jumprelu", *WHOLE, "model.seed=4"),
        f"model.control={added.config.model.control.name}",
    ]
    (by_hand,) = typed(("y", added.overrides[len(SMALL) :]))
    assert by_hand.config == added.config


def test_what_is_typed_is_trained_once_and_keeps_its_folder(typed):
    both = [(f"model.control={name}", [f"model.control={name}"]) for name in ("null", "pca")]
    controls = typed(*((name, [*each, "sweep.controls=true"]) for name, each in both))
    trained, pca = names(expand_jobs(controls))
    assert trained[0] == "model.control=null"
    assert {"model.control=pca", "model.control=frozen_decoder"} <= {*trained}
    assert pca == ["model.control=pca"], "a control has none of its own"


def test_an_sae_that_can_have_no_control_is_told_why(typed):
    resampled = ["callbacks.resample.every=128", "sweep.controls=true"]
    with pytest.raises(UserError, match=r"^sweep\.controls=true: callbacks\.resample\.every=128: "):
        expand_jobs(typed(("x", resampled)))


def test_a_search_is_told_the_mean_over_seeds_without_controls(typed):
    (group,) = expand_jobs(typed(("x", ["model=topk", *WHOLE])))
    values = {job.folder: {"l0": 4.0, "recovered": 0.0} for job in group}
    for name, recovered in (("x", 0.5), ("x,model.seed=1", 0.25)):
        values[Path("sweep", name)] = {"l0": 4.0, "recovered": recovered}
    assert average_objective(group, values) == 0.375
    # added up in the order of seeds, in every process: (0.1 + 0.2) + 0.3 is not 0.1 + (0.2 + 0.3)
    (three,) = expand_jobs(typed(("x", ["model=topk", "sweep.seeds=3"])))
    for job, recovered in zip(three, (0.1, 0.2, 0.3), strict=True):
        values[job.folder] = {"l0": 4.0, "recovered": recovered}
    assert average_objective(three, values) == (0.1 + 0.2 + 0.3) / 3
    values[Path("sweep", "x,model.seed=1")] = None
    assert average_objective(group, values) is None


@pytest.mark.slow
def test_controls_have_the_concepts_of_their_sae_and_its_seed_if_possible(typed, tmp_path):
    seeds = {"a": (3, 0), "b": (3, 1), "c": (4, 0)}  # of concepts and SAE
    names = {name: [f"data.seed={d}", f"model.seed={m}"] for name, (d, m) in seeds.items()}
    jobs = typed(*((n, each) for n, each in names.items()))
    controls = typed(*((f"{n}_pca", [*each, "model.control=pca"]) for n, each in names.items()))
    for job in [*jobs, *controls]:
        job = replace(job, folder=tmp_path / job.folder.name)
        job.folder.mkdir()
        begin_run(job)
        metrics = {"held_out": {"l0": 3, "explained_variance": 0.5}}
        (job.folder / "metrics.json").write_text(json.dumps(metrics))
    for name in names:
        assert find_controls(tmp_path / name) == {Control.pca: tmp_path / f"{name}_pca"}
    (tmp_path / "b_pca" / "metrics.json").unlink()
    (tmp_path / "c_pca" / "metrics.json").unlink()
    assert find_controls(tmp_path / "b") == {Control.pca: tmp_path / "a_pca"}
    assert find_controls(tmp_path / "c") == {}


@pytest.mark.parametrize("seeds", ["seed=0,1", "model.seed=range(3)"])
def test_seeds_that_are_typed_and_added_are_refused(tmp_path, monkeypatch, seeds):
    """Each typed seed would get others: model.seed=0,1 sweep.seeds=2 would train 0, 1 and 2."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^sweep\.seeds=2: .*{re.escape(seeds)} with others"):
        train_sweep(*SMALL, seeds, "sweep.seeds=2")


def test_a_plain_run_and_other_launchers_say_that_they_add_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^sweep\.seeds=2: it adds runs to a sweep; give -m "):
        train(*SMALL, "sweep.seeds=2")
    register_schemas()
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        arguments = [*SMALL, "sweep.controls=true", "hydra/launcher=basic"]
        config = loader.load_configuration("config", arguments, RunMode.MULTIRUN)
        with pytest.raises(SystemExit, match=r"sweep\.controls=true: only hydra/launcher=one_pass"):
            Sweep().on_multirun_start(config)


@pytest.mark.slow
def test_a_sweep_with_seeds_and_controls_is_taken_up_again_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [*SMALL, "model=topk", "model.k=4,6", *WHOLE, "hydra.sweep.subdir=${hydra:job.num}"]
    with monkeypatch.context() as patch:
        patch.setattr(passes, "_train_pass", lambda planned: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_sweep(*line, "hydra.sweep.dir=sweep")
    begun = {job.folder.name: job for job in read_sweep(Path("sweep"))}
    assert {"0", "1", "1,model.seed=1", "1,model.control=pca"} <= begun.keys()
    again = train_sweep(*line, "hydra.sweep.dir=sweep")
    assert {run.folder.name for run in again} == begun.keys()
    assert [run.folder.name for run in again][0] == "0"
    monkeypatch.setattr(passes, "_train_pass", lambda planned: 1 / 0)
    assert {run.folder for run in train_sweep("resume=sweep")} == {run.folder for run in again}
    with pytest.raises(UserError, match="sweep.seeds=3 cannot be given with it"):
        train_sweep("resume=sweep", "sweep.seeds=3")
