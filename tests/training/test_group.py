"""Claim 1: SAEs on a shared pass equal those trained alone; claim 7: a sweep takes one pass."""

import fcntl
import os
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from test_run import (
    RESAMPLING,
    Killed,
    assert_same,
    checkpoint,
    curves,
    die,
    interrupt,
    kill_after,
    resume,
    weights,
)
from tiny_run import BATCH, STEPS

from sae_lightning import UserError
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.llm.splice import LOGIT_ROWS
from sae_lightning.runs import devices, folders, memory, passes, run
from sae_lightning.runs.jobs import make_jobs as jobs_of
from sae_lightning.runs.jobs import read_job, read_sweep
from sae_lightning.runs.search import SweepConfig
from sae_lightning.sae import ARCHITECTURES, SAEConfig
from sae_lightning.sae.gated import GatedConfig, GatedLoss
from sae_lightning.sae.jumprelu import JumpReLUConfig, JumpReLULoss
from sae_lightning.sae.matryoshka import MatryoshkaConfig, MatryoshkaLoss
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.relu import DenseConfig, DenseLoss, ReLULoss
from sae_lightning.sae.topk import TopKConfig
from sae_lightning.stream import held_out, rows
from sae_lightning.stream import text_source as text
from sae_lightning.training import checkpoints
from sae_lightning.training.logger_settings import LoggerConfig
from sae_lightning.training.settings import CallbacksConfig, OptimConfig, Precision

DENSE = {"model": DenseConfig(name="dense", features=20), "loss": DenseLoss()}
# every architecture, some with a target L0, resampled or with a term for dead features; other
# sizes, sites, rates and seeds
MIX = {
    "relu": {
        "loss": ReLULoss(l1=0.3, target_l0=3, p=0.5),
        "optim": OptimConfig(lr=3e-2),
        "callbacks": RESAMPLING,
    },
    "dense": DENSE,
    "topk": {
        "layer": LayerConfig(index=2),
        "model": TopKConfig(name="topk", features=96, k=4, seed=5),
        "loss": AuxKLoss(),
        "callbacks": RESAMPLING,
    },
    "batch_topk": {
        "layer": LayerConfig(index=1, source=Kind.mlp_in, target=Kind.mlp),
        "model": TopKConfig(name="batch_topk", features=48, k=4, skip=True),
        "loss": AuxKLoss(),
        "callbacks": CallbacksConfig(dead_after=3 * BATCH),
    },
    "jumprelu": {
        "layer": LayerConfig(index=0, source=Kind.mlp),
        "model": JumpReLUConfig(name="jumprelu", features=48),
        "loss": JumpReLULoss(l0=0.1, target_l0=3, preact=1e-3),
        "optim": OptimConfig(lr=1e-2, clip=1e-3),
        "callbacks": RESAMPLING,
    },
    "gated": {
        "model": GatedConfig(name="gated", features=40),
        "loss": GatedLoss(l1=0.3, preact=1e-3),
        "optim": OptimConfig(lr=3e-2),
        "callbacks": RESAMPLING,
    },
    "matryoshka": {
        "model": MatryoshkaConfig(name="matryoshka", features=33, k=4),
        "loss": MatryoshkaLoss(),
        "callbacks": RESAMPLING,
    },
}


def make_sweep(job, name: str, jobs: dict) -> list:
    """New jobs {name: groups} in a sweep folder."""
    made = [job(f"{name}/{each}", **changes) for each, changes in jobs.items()]
    return [
        replace(one, multirun=True, sweep_folder=one.folder.parent, overrides=[]) for one in made
    ]


@pytest.fixture
def sweep(job):
    """sweep(name, **{job: groups}) -> new jobs in a sweep folder of that name."""
    return lambda name, **jobs: make_sweep(job, name, jobs)


@pytest.fixture(scope="module")
def mixed(common_job):
    """An uninterrupted sweep of all architectures -> its jobs and what they returned."""
    jobs = make_sweep(common_job, "mixed", MIX)
    return jobs, passes.train_jobs(jobs)


def assert_trained_as_alone(jobs, results, alone):
    for one, metrics, other in zip(jobs, results, alone, strict=True):
        assert passes.train_jobs([other]) == [metrics]
        assert_same(one.folder, other.folder)
    assert len({weights(one.folder) for one in jobs}) == len(jobs)


@pytest.mark.slow
def test_heads_of_a_group_end_as_when_trained_alone(sweep, mixed):
    names = {changes.get("model", SAEConfig()).name for changes in MIX.values()}
    assert names == set(ARCHITECTURES)
    assert_trained_as_alone(*mixed, sweep("alone", **MIX))


@pytest.mark.slow
def test_so_they_do_in_the_other_precision(job, sweep, mixed):
    (one, *_), _ = mixed
    used = read_job(one.folder).config.trainer.precision
    other = Precision.bf16 if used is Precision.fp32 else Precision.fp32
    trainer = replace(job("x").config.trainer, precision=other)
    few = {name: MIX[name] | {"trainer": trainer} for name in ("relu", "batch_topk", "gated")}
    jobs = sweep("together", **few)
    assert_trained_as_alone(jobs, passes.train_jobs(jobs), sweep("alone", **few))


@pytest.mark.slow
def test_every_architecture_killed_ends_as_if_it_had_not_been(sweep, mixed, monkeypatch):
    assert set(MIX) == set(ARCHITECTURES)
    (whole, results), jobs = mixed, sweep("killed", **MIX)
    for step in (12, 37):
        kill_after(monkeypatch, step, *jobs)
        jobs = [replace(one, resumed=True) for one in jobs]
    assert passes.train_jobs(jobs) == results
    for one, other in zip(whole, jobs, strict=True):
        assert_same(one.folder, other.folder)
    # what a resumed run has to get right did happen
    for name in ("relu", "jumprelu"):
        path = curves(whole[0].sweep_folder / name)[f"optim/{MIX[name]['loss'].sparsity}"]
        assert len({coefficient for _, coefficient in path}) > 5
    resampled = [curves(one.folder).get("train/resampled", [(0, 0)]) for one in whole]
    assert any(count for points in resampled for _, count in points)


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_a_group_runs_the_llm_as_often_as_one_job(job, sweep, monkeypatch):
    """Claim 7, counted in forward passes of the LLM, for training and for held-out text; what is
    left is the LLM with each SAE in place."""
    captured, forward = [], []
    for module in (rows, held_out):
        monkeypatch.setattr(module, "capture", counted(module.capture, captured))
    loaded = text.load_llm

    def load(config, *blocks):
        llm = loaded(config, *blocks)
        body = llm.model.base_model
        body.forward = counted(body.forward, forward)  # `capture` too
        return llm

    monkeypatch.setattr(text, "load_llm", load)
    passes.train_jobs([job("one")])
    alone, whole = len(captured), len(forward) - len(captured)
    assert alone > 20
    passes.train_jobs(
        sweep("many", **{f"{l1}": {"loss": ReLULoss(l1=l1)} for l1 in (1e-3, 1e-2, 0.1)})
    )
    assert len(captured) - alone == alone
    # scored three times, on 150 held-out tokens in 10 sequences, 4 at a time: 9 forward passes
    # with each SAE
    assert len(forward) - 2 * alone - 2 * whole == 2 * 9


SEEDS = {f"{seed}": {"model": SAEConfig(features=48, seed=seed)} for seed in range(3)}


@pytest.fixture(scope="module")
def whole(common_job):
    """An uninterrupted sweep of three."""
    jobs = make_sweep(common_job, "whole", SEEDS)
    passes.train_jobs(jobs)
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(5, 7), (12, 25), (23, STEPS)])
def test_a_sweep_killed_twice_ends_as_if_it_had_not_been(sweep, whole, monkeypatch, steps):
    jobs = sweep("killed", **SEEDS)
    for step in steps:
        kill_after(monkeypatch, step, *jobs)
        jobs = read_sweep(jobs[0].sweep_folder)
        for one in jobs:
            one.resumed, one.sweep_folder = True, one.folder.parent
    assert passes.train_jobs(jobs) == [
        folders.read_metrics(one.folder)["held_out"] for one in whole
    ]
    for one, other in zip(whole, jobs, strict=True):
        assert_same(one.folder, other.folder)


@pytest.mark.slow
def test_each_head_can_go_on_alone_and_heads_at_different_steps_form_passes(
    sweep, whole, monkeypatch, capsys
):
    jobs = sweep("killed", **SEEDS)
    kill_after(monkeypatch, 15, *jobs)
    assert checkpoint(jobs[0].folder)["global_step"] == 10
    one, two, three = jobs
    resume(one)
    assert_same(whole[0].folder, one.folder)
    # the second is killed later than the third
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 25, die)
        resume(two)
    rest = [replace(one, resumed=True) for one in read_sweep(jobs[0].folder.parent)]
    assert [len(each.jobs) for each in passes.plan_passes(rest[1:])] == [1, 1]
    capsys.readouterr()
    passes.train_jobs(rest)
    output = capsys.readouterr().out
    assert "0 is finished" in output
    assert "2 jobs on 2 passes" in output
    for mine, other in zip(jobs, whole, strict=True):
        assert_same(mine.folder, other.folder)


@pytest.mark.slow
def test_heads_share_one_file_of_the_stream(whole):
    files = [one.folder / "checkpoints" / f"stream-{STEPS}.pt" for one in whole]
    assert len({file.stat().st_ino for file in files}) == 1
    for file in files:
        assert sorted(each.name for each in file.parent.iterdir()) == ["last.ckpt", file.name]


@pytest.mark.slow
def test_without_hard_links_each_has_a_copy(sweep, whole, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(checkpoints.os, "link", refuse)
    jobs = sweep("copies", **SEEDS)
    kill_after(monkeypatch, 15, *jobs)
    resume(jobs[2])
    assert_same(jobs[2].folder, whole[2].folder)


@pytest.mark.slow
def test_a_head_that_diverges_is_frozen_and_the_others_do_not_notice(
    sweep, whole, capsys, monkeypatch
):
    bad = {"optim": OptimConfig(lr=1e30, clip=None), "model": SAEConfig(features=48, seed=1)}
    jobs = sweep("diverged", **(SEEDS | {"1": bad}))
    results = passes.train_jobs(jobs)
    assert [metrics is None for metrics in results] == [False, True, False]
    for number in (0, 2):
        assert_same(jobs[number].folder, whole[number].folder)
    failure = folders.read_failure(jobs[1].folder)
    assert failure["diverged"]
    assert failure["reason"].startswith("stopped at step 1 (64 tokens): the loss term mse")
    output = capsys.readouterr().out
    assert f"1: {failure['reason']}" in output.replace("\n", "")
    assert not (jobs[1].folder / "metrics.json").exists()
    # a resumed sweep does not try it again
    again = [replace(one, resumed=True) for one in jobs]
    monkeypatch.setattr(devices, "run_pass", lambda jobs: pytest.fail("nothing is left to train"))
    assert passes.train_jobs(again) == results
    assert "1 had failed: stopped at step 1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_head_that_diverges_late_keeps_its_last_checkpoint(sweep, whole, monkeypatch, what):
    jobs = sweep("diverged", **SEEDS)

    frozen = {}

    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step >= 18:
                frozen["now"] = module.heads[1].sae.W_dec.detach().clone()
                frozen.setdefault("then", frozen["now"])

        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_step == 17:
                W_enc = module.heads[1].sae.W_enc
                if what == "loss":
                    W_enc.data[0, 0] = float("nan")
                else:
                    W_enc.register_hook(lambda gradient: gradient * float("inf"))

    make_callbacks = run.make_callbacks
    monkeypatch.setattr(run, "make_callbacks", lambda *args: [Spoil(), *make_callbacks(*args)])
    assert passes.train_jobs(jobs)[1] is None
    for number in (0, 2):
        assert_same(jobs[number].folder, whole[number].folder)
    assert checkpoint(jobs[1].folder)["global_step"] == 10
    assert torch.equal(frozen["now"], frozen["then"]), "frozen: no update after the failure"
    assert "the last good checkpoint is" in folders.read_failure(jobs[1].folder)["reason"]
    assert curves(jobs[1].folder)["train/loss"][-1][0] == 16 * BATCH


@pytest.mark.slow
def test_where_all_diverge_the_pass_ends(sweep, capsys):
    jobs = sweep("diverged", **{f"{lr}": {"optim": OptimConfig(lr=lr)} for lr in (1e30, 1e31)})
    assert passes.train_jobs(jobs) == [None, None]
    assert "none of the 2 SAEs of this pass is left" in capsys.readouterr().err
    assert passes.train_jobs([replace(one, resumed=True) for one in jobs]) == [None, None]


@pytest.mark.slow
def test_a_pass_that_fails_does_not_end_the_sweep(job, sweep, monkeypatch, capsys):
    seeds = {f"{seed}": {"seed": seed} for seed in range(3)}
    jobs = sweep("seeds", **seeds)
    train = devices.run_pass

    def broken(this):
        if this.jobs[0].config.seed == 1:
            raise ZeroDivisionError("a bug")
        return train(this)

    monkeypatch.setattr(devices, "run_pass", broken)
    first, second, third = passes.train_jobs(jobs)
    assert second is None
    assert first != third
    assert folders.read_failure(jobs[1].folder)["reason"] == "ZeroDivisionError: a bug"
    assert "error: 1: ZeroDivisionError: a bug" in capsys.readouterr().err
    # put right, a resumed sweep trains what is missing
    monkeypatch.setattr(devices, "run_pass", train)
    again = passes.train_jobs([replace(one, resumed=True) for one in jobs])
    assert (again[0], again[2]) == (first, third)
    assert again[1] is not None
    assert folders.read_failure(jobs[1].folder) is None


def planned(jobs):
    return [[one.folder.name for one in each.jobs] for each in passes.plan_passes(jobs)]


def test_jobs_are_grouped_by_stream_and_split_evenly(sweep, tmp_path):
    head = {f"l{l1}": {"loss": ReLULoss(l1=l1)} for l1 in range(1, 6)}
    other = {"other": {"seed": 1}}
    assert planned(sweep("a", **head, **other)) == [["l1", "l2", "l3", "l4", "l5"], ["other"]]
    limited = {
        name: changes | {"sweep": SweepConfig(max_heads=4)} for name, changes in head.items()
    }
    assert planned(sweep("b", **limited)) == [["l1", "l2"], ["l3", "l4", "l5"]]


@pytest.mark.slow
def test_a_group_too_large_for_memory_is_split(sweep, monkeypatch, capsys):
    jobs = sweep("many", **{f"{seed}": SEEDS[f"{seed % 3}"] for seed in range(5)})
    (together,) = passes.plan_passes(jobs)
    # d = 24, 48 features: 2 x 24 x 48 + 48 + 24 = 2376 weights, 18 bytes each
    each = 18 * 2376
    shared = together.memory - 5 * each
    monkeypatch.setattr(memory, "read_free_memory", lambda config: (shared + 2.5 * each) / 0.9)
    assert [len(part.jobs) for part in passes.plan_passes(jobs)] == [1, 2, 2]
    passes.train_jobs(jobs)
    assert "5 jobs on 3 passes of the LLM" in capsys.readouterr().out
    monkeypatch.setattr(memory, "read_free_memory", lambda config: shared + each)  # none to spare
    one_by_one = sweep("more", **SEEDS)
    assert [len(part.jobs) for part in passes.plan_passes(one_by_one)] == [1, 1, 1]


def test_one_job_that_cannot_run_keeps_all_from_starting(sweep):
    jobs = sweep("bad", good={}, bad={"layer": LayerConfig(index=3)})
    with pytest.raises(UserError, match=r"^layer\.index=3: this LLM has 3 blocks; give 0 to 2$"):
        passes.train_jobs(jobs)
    assert not any((one.folder / "config.yaml").exists() for one in jobs)


@pytest.mark.slow
def test_the_same_run_twice_is_trained_once(sweep, monkeypatch):
    (one,) = sweep("twice", a={})
    trained = []
    monkeypatch.setattr(devices, "run_pass", counted(run.run_pass, trained))
    first, second = passes.train_jobs([one, one])
    assert first == second
    (third,) = passes.train_jobs([one])
    assert third == first
    assert len(trained) == 1
    other = replace(one, config=replace(one.config, seed=3))
    with pytest.raises(UserError, match="already holds a run"):
        passes.train_jobs([other])


def resumed(folder, *settings, **sweep):
    """The jobs of `-m resume=<folder> <settings>`."""
    group = {"llm": {"trust_remote_code": False}, "logger": LoggerConfig()}
    group |= {"sweep": SweepConfig(**sweep)}
    asked = OmegaConf.create({"resume": str(folder)} | group)
    return jobs_of(asked, Path("new"), [f"resume={folder}", *settings], Path("new"))


@pytest.mark.slow
def test_a_resumed_sweep_keeps_its_settings_and_may_be_split_otherwise(sweep, whole, monkeypatch):
    asked = {"sweep": SweepConfig(l0=5.0, max_heads=3)}
    jobs = sweep("killed", **{name: seed | asked for name, seed in SEEDS.items()})
    kill_after(monkeypatch, 15, *jobs)
    (same, *_) = resumed(jobs[0].sweep_folder)
    assert same.config.sweep == asked["sweep"]
    again = resumed(jobs[0].sweep_folder, "sweep.max_heads=2", max_heads=2)
    assert {one.config.sweep.max_heads for one in again} == {2}
    assert {one.config.sweep.l0 for one in again} == {5}
    assert [len(part.jobs) for part in passes.plan_passes(again)] == [1, 2]
    passes.train_jobs(again)
    for one, other in zip(whole, jobs, strict=True):
        assert_same(one.folder, other.folder)
    (single,) = resumed(jobs[0].folder, "sweep.max_heads=1", max_heads=1)
    assert (single.resumed, single.sweep_folder, single.config.sweep.max_heads) == (True, None, 1)


@pytest.mark.slow
def test_runs_that_read_other_sites_in_other_passes_are_resumed_together(
    job, sweep, monkeypatch, capsys
):
    layers = {"0": {"layer": LayerConfig(index=0)}, "2": {"layer": LayerConfig(index=2)}}
    alone = {"sweep": SweepConfig(max_heads=1)}
    jobs = sweep("sites", **{name: layer | alone for name, layer in layers.items()})
    with monkeypatch.context() as patch:
        interrupt(patch, 15, lambda: 1 / 0)
        assert passes.train_jobs(jobs) == [None, None]
    capsys.readouterr()
    again = resumed(jobs[0].sweep_folder, "sweep.max_heads=2", max_heads=2)
    assert None not in passes.train_jobs(again)
    assert "2 jobs on 1 pass of the LLM" in capsys.readouterr().out
    for name, layer in layers.items():
        whole = job(f"whole{name}", **layer)
        passes.train_jobs([whole])
        assert_same(jobs[0].sweep_folder / name, whole.folder)


def test_jobs_that_would_share_a_folder_are_refused(sweep):
    one, other = sweep("shared", a={}, b={"loss": ReLULoss(l1=0.5)})
    with pytest.raises(
        UserError, match=r"jobs that differ in loss\.l1 would share the folder .*number them: "
    ):
        passes.train_jobs([one, replace(other, folder=one.folder)])
    assert not one.folder.exists()


@pytest.mark.slow
def test_a_failed_pass_leaves_nothing_in_memory(sweep, monkeypatch):
    jobs = sweep("seeds", **{f"{seed}": {"seed": seed} for seed in range(2)})
    loaded, load = [], text.load_llm

    def remember(config, *blocks):
        assert not any(llm() for llm in loaded), "the LLM of the pass that failed"
        llm = load(config, *blocks)
        loaded.append(weakref.ref(llm.model))
        return llm

    monkeypatch.setattr(text, "load_llm", remember)
    with monkeypatch.context() as patch:
        interrupt(patch, 5, lambda: 1 / 0)
        assert passes.train_jobs(jobs) == [None, None]
    assert len(loaded) == 2


@pytest.mark.slow
def test_out_of_memory_says_how_to_go_on_with_fewer(sweep, monkeypatch, capsys):
    jobs = sweep("many", **SEEDS)
    monkeypatch.setattr(devices, "run_pass", lambda jobs: raise_(torch.OutOfMemoryError()))
    assert passes.train_jobs(jobs) == [None] * 3
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory with 3 SAEs on one pass; continue with fewer: ")
    assert line.rstrip().endswith(f"train.py -m resume={jobs[0].sweep_folder} sweep.max_heads=2")


@pytest.mark.slow
def test_a_plain_run_out_of_memory_says_what_to_lower(job, monkeypatch):
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
    monkeypatch.setattr(devices, "run_pass", lambda jobs: raise_(allocator))
    with pytest.raises(UserError, match=r"^out of memory with 1 SAE on one pass; lower model\.fea"):
        passes.train_jobs([job("large")])


LARGE = {
    "model.features": {"model": {"features": 2_000_000}},
    "data.pool": {"data": {"pool": 200_000_000}},
    "llm.batch": {"llm": {"batch": 4_000_000}},
    "trainer.batch": {
        "trainer": {"batch": 8_000_000, "tokens": 16_000_000},
        "data": {"pool": 8_000_000},
    },
}


@pytest.mark.parametrize("setting", LARGE)
@pytest.mark.parametrize("many", [False, True])
def test_what_cannot_fit_is_refused_before_the_llm_is_loaded(
    job, sweep, monkeypatch, setting, many
):
    monkeypatch.setattr(text, "load_llm", lambda *_: raise_(AssertionError("loaded")))
    monkeypatch.setattr(memory, "read_free_memory", lambda config: 1.5e9)
    jobs = sweep("sweep", fits={}, large={}) if many else [job("run")]
    config = jobs[-1].config
    groups = {
        name: replace(getattr(config, name), **changes) for name, changes in LARGE[setting].items()
    }
    jobs[-1] = replace(jobs[-1], config=replace(config, **groups))
    with pytest.raises(UserError, match=rf"{setting}=\d+.*: training needs about .* GB are free"):
        passes.train_jobs(jobs)
    assert not any((one.folder / "config.yaml").exists() for one in jobs)
    believed = replace(config, **groups, sweep=SweepConfig(max_heads=1))
    assert len(passes.plan_passes([replace(jobs[-1], config=believed)])) == 1


def test_where_nothing_would_fit_no_setting_is_blamed(job, monkeypatch):
    monkeypatch.setattr(memory, "read_free_memory", lambda config: -1e8)
    with pytest.raises(UserError, match=r"^0\.0 GB of memory are free, and the libraries alone "):
        passes.train_jobs([job("run")])


def raise_(error):
    raise error


@pytest.mark.slow
def test_runs_that_had_come_to_their_end_when_the_pass_failed_have_not_failed(sweep, monkeypatch):
    jobs = sweep("end", **SEEDS)
    write = run.write_json

    def full(path, content):
        if path.parent.name == "1":
            raise OSError("no room")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", full)
        first, *others = passes.train_jobs(jobs)
    assert first is not None
    assert others == [None, None]
    assert [folders.read_failure(one.folder) is None for one in jobs] == [True, False, False]
    assert None not in passes.train_jobs(resumed(jobs[0].sweep_folder))
    assert [folders.read_failure(one.folder) for one in jobs] == [None] * 3


@pytest.mark.slow
def test_ctrl_c_in_the_last_update_of_a_pass_ends_the_sweep(sweep, monkeypatch, capsys):
    jobs = sweep("seeds", **{f"{seed}": {"seed": seed} for seed in range(2)})
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        interrupt(patch, STEPS, lambda: os.kill(os.getpid(), signal.SIGINT))
        passes.train_jobs(jobs)
    assert end.value.code == 128 + signal.SIGINT
    assert f"train.py -m resume={jobs[0].sweep_folder}" in capsys.readouterr().out.replace("\n", "")
    assert [folders.read_metrics(one.folder) is None for one in jobs] == [False, True]


@pytest.mark.slow
def test_a_run_that_trains_elsewhere_is_left_alone(whole, tmp_path):
    again = resumed(shutil.copytree(whole[0].sweep_folder, tmp_path / "sweep"))
    (again[1].folder / "metrics.json").unlink()
    lock = open(again[1].folder / ".lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is training there"):
        passes.train_jobs(again)
    assert folders.read_failure(again[1].folder) is None
    lock.close()
    assert None not in passes.train_jobs(again)


def test_without_the_llms_loss_an_estimate_has_neither_later_blocks_nor_logits(job, tiny):
    config = job("one").config
    quick = replace(
        config, eval=replace(config.eval, loss_tokens=0), sweep=SweepConfig(objective="l0")
    )
    cached = replace(quick, data=replace(quick.data, cache=True))
    sites = [config.layer.resolve_sites(3)]
    llm = config.data_source.read_shape()
    pairs = [memory.estimate_memory([c], sites, llm) for c in (config, quick, cached)]
    whole, less, same = (one.shared_bytes for one in pairs)
    model = tiny("llama").model
    gone = [model.model.layers[2], model.lm_head]
    weights = 4 * sum(p.numel() for module in gone for p in module.parameters())
    logits = 4 * 8 * LOGIT_ROWS * 100
    assert whole - less == weights + logits
    assert whole - same == logits
    hidden = 4 * 4 * 16 * 24  # the last ones of 4 sequences of 16 tokens, with each SAE in place
    assert [one.hidden_bytes for one in pairs] == [hidden, 0, 0]
