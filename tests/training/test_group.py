"""Claim 1: SAEs that share a pass are those that were trained alone; claim 7: one pass for all."""

from dataclasses import replace

import pytest
from test_run import RESAMPLING, assert_same, weights

from sae_lightning import run
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.losses import DenseLoss, ReLULoss
from sae_lightning.sae import SAEConfig
from sae_lightning.stream import rows
from sae_lightning.training.settings import OptimConfig, Precision

DENSE = {"model": SAEConfig(name="dense", features=20), "loss": DenseLoss()}
# two objectives, three dictionary sizes, three sites, other rates, seeds and recipes
MIX = {
    "relu": {"loss": ReLULoss(l1=0.3), "optim": OptimConfig(lr=3e-2), "callbacks": RESAMPLING},
    "dense": DENSE,
    "deep": {"layer": LayerConfig(index=2), "model": SAEConfig(features=96, seed=5)},
    "mlp": {"layer": LayerConfig(index=0, site=Kind.mlp), "optim": OptimConfig(clip=1e-3)},
}


@pytest.fixture
def sweep(job, tmp_path):
    """sweep(name, **{job: groups}) -> new jobs in a sweep folder of that name."""

    def make(name: str, **jobs):
        made = [job(f"{name}/{each}", **changes) for each, changes in jobs.items()]
        return [replace(one, sweep=tmp_path / name, overrides=[]) for one in made]

    return make


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_heads_of_a_group_end_as_when_trained_alone(job, sweep, precision):
    trainer = replace(job("x").config.trainer, precision=precision)
    mix = {name: changes | {"trainer": trainer} for name, changes in MIX.items()}
    together = run.run(sweep("together", **mix))
    for number, alone in enumerate(sweep("alone", **mix)):
        assert run.run([alone]) == [together[number]]
        assert_same(alone.folder.parent.parent / "together" / alone.folder.name, alone.folder)
    assert len({weights(one.folder) for one in sweep("together", **mix)}) == len(mix)


def test_a_group_runs_the_llm_as_often_as_one_job(job, sweep, monkeypatch):
    calls = []
    for module in (rows, run):
        monkeypatch.setattr(module, "capture", counting(rows.capture, calls), raising=False)
    run.run([job("one")])
    alone = len(calls)
    assert alone > 20
    run.run(sweep("many", **{f"{l1}": {"loss": ReLULoss(l1=l1)} for l1 in (1e-3, 1e-2, 0.1)}))
    assert len(calls) == 2 * alone


def counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counted
