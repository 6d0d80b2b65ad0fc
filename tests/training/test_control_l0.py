"""A control follows the L0 that a coefficient gives its SAE, and the SAE notices nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run import checkpoint, kill_after, leaves, weights
from tiny_run import WORLD_BATCH, synthetic_job

from sae_lightning.runs import passes
from sae_lightning.runs.checks import resolve_auto
from sae_lightning.runs.jobs import read_sweep
from sae_lightning.runs.plan import (
    assign_jobs,
    cut_evenly,
    cut_groups,
    find_leaders,
    group_by_leader,
)
from sae_lightning.runs.search import SweepConfig
from sae_lightning.sae import SAEConfig
from sae_lightning.sae.controls import Control
from sae_lightning.sae.jumprelu import JumpReLUConfig, JumpReLULoss
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.sae.topk import TopKConfig

RELU = {"model": SAEConfig(features=48, seed=3), "loss": ReLULoss(l1=3e-2)}
JUMPRELU = {
    "model": JumpReLUConfig(name="jumprelu", features=48, seed=3),
    "loss": JumpReLULoss(l0=2e-3),
}
TOPK = {"model": TopKConfig(name="topk", features=48, k=4, seed=3), "loss": AuxKLoss()}


@pytest.fixture
def pair(tmp_path):
    """pair(name, control, **groups) -> an SAE and its control, of one sweep."""

    def make(name, control=Control.frozen_decoder, updates=60, **groups):
        sweep = tmp_path / name
        job = synthetic_job(sweep / "trained", **groups)
        tokens = updates * WORLD_BATCH
        job.config.trainer = replace(job.config.trainer, tokens=tokens)
        job = replace(job, multirun=True, sweep_folder=sweep)
        model = replace(job.config.model, control=control)
        config = replace(job.config, model=model)
        return [job, replace(job, config=config, folder=sweep / "control")]

    return make


def assert_same(one: Path, other: Path) -> None:
    """The saved weights and the last checkpoints are equal bit for bit."""
    assert weights(one) == weights(other)
    for key in ("state_dict", "optimizer_states", "loops"):
        assert leaves(checkpoint(one)[key]) == leaves(checkpoint(other)[key])


@pytest.mark.slow
def test_a_control_ends_at_the_l0_of_its_sae(pair):
    pairs = [("relu", RELU), ("jumprelu", JUMPRELU)]
    both = [job for name, groups in pairs for job in pair(name, updates=500, **groups)]
    metrics = passes.train_jobs(both)
    controls = [pair(f"{name} alone", updates=500, **groups)[1] for name, groups in pairs]
    by_themselves = passes.train_jobs(controls)
    for trained, control, alone in zip(metrics[::2], metrics[1::2], by_themselves, strict=True):
        assert control["l0"] == pytest.approx(trained["l0"], rel=0.1)
        assert abs(alone["l0"] - trained["l0"]) > 2 * abs(control["l0"] - trained["l0"])
    for job in controls:
        state = checkpoint(job.folder)["state_dict"]
        assert state["heads.0.l0_target"] == -1 and state["heads.0.steering"] == 1


@pytest.mark.slow
def test_an_sae_that_is_followed_trains_as_if_alone(pair):
    for name, groups in (("relu", RELU), ("jumprelu", JUMPRELU)):
        both, (alone, _) = pair(name, **groups), pair(f"{name} alone", **groups)
        passes.train_jobs(both)
        passes.train_jobs([alone])
        assert_same(both[0].folder, alone.folder)


@pytest.mark.slow
def test_a_jumprelu_with_a_frozen_encoder_follows_without_losing_its_features(pair):
    both = pair("both", Control.frozen_encoder, updates=1000, **JUMPRELU)
    trained, control = passes.train_jobs(both)
    assert control["l0"] == pytest.approx(trained["l0"], rel=0.1)
    assert control["unfired"] < 0.1


@pytest.mark.slow
def test_a_pair_that_was_killed_ends_as_if_it_had_not_been(pair, monkeypatch):
    whole, killed = pair("whole", **RELU), pair("killed", **RELU)
    passes.train_jobs(whole)
    kill_after(monkeypatch, 33, *killed)
    again = [replace(job, resumed=True) for job in read_sweep(killed[0].sweep_folder)]
    assert find_leaders(again) == [1, None], "in the order of their names"
    passes.train_jobs(again)
    for one, other in zip(whole, killed, strict=True):
        assert_same(one.folder, other.folder)


@pytest.mark.slow
def test_a_pair_that_was_saved_at_different_updates_says_so(pair, monkeypatch, capsys):
    both = pair("both", **RELU)
    for job, step in zip(both, (11, 21), strict=True):
        job.config.trainer = replace(job.config.trainer, checkpoint_every=10 * WORLD_BATCH)
        kill_after(monkeypatch, step, job)
    again = [resolve_auto(replace(job, resumed=True)) for job in both]
    capsys.readouterr()
    assert len(passes.plan_passes(again)) == 2
    assert "than their SAEs and train on another pass: they keep to" in capsys.readouterr().out
    assert len(passes.plan_passes(again[1:])) == 1
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_a_control_whose_sae_fails_keeps_its_last_l0_as_the_target(pair, monkeypatch):
    both = pair("both", **RELU)
    seen = []

    def break_sae(self, trainer, module, *_):
        seen.append(float(module.heads[0].last_step.l0))
        if trainer.global_step == 30:
            module.heads[0].sae.W_dec.data.fill_(torch.nan)

    monkeypatch.setattr(
        "sae_lightning.training.callbacks.update.Schedule.on_train_batch_end", break_sae
    )
    failed, control = passes.train_jobs(both)
    assert failed is None and control["l0"] > 0
    state = checkpoint(both[1].folder)["state_dict"]
    assert state["heads.0.l0_target"] == seen[29]
    assert state["heads.0.steering"] != 1


def test_only_an_l0_that_a_coefficient_decides_is_followed(pair):
    targeted = RELU | {"loss": ReLULoss(target_l0=4.0)}
    seed = {"model": replace(RELU["model"], seed=4)}
    jobs = [
        *pair("relu", **RELU),
        *pair("topk", **TOPK),
        *pair("targeted", **targeted),
        *pair("seed", **RELU | seed),
        pair("pca", Control.pca, **RELU)[1],
    ]
    assert find_leaders(jobs) == [None, 0, None, None, None, None, None, 6, 0]
    assert group_by_leader(jobs) == [[0, 1, 8], [2], [3], [4], [5], [6, 7]]
    assert cut_groups(group_by_leader(jobs), 2) == [[0, 1], [8], [2], [3], [4], [5], [6, 7]]


@pytest.mark.parametrize(
    ("sizes", "most", "parts"),
    [
        ([1] * 10, 4, [3, 3, 4]),  # evenly
        ([3, 3, 3], 6, [3, 6]),
        ([3, 3, 3], 4, [3, 3, 3]),
        ([1, 4, 1, 4], 5, [5, 5]),
        ([2, 3], 10, [5]),
    ],
)
def test_passes_are_cut_between_groups(sizes, most, parts):
    groups = [[number] * size for number, size in enumerate(sizes)]
    cut = cut_evenly(groups, most)
    assert [group for part in cut for group in part] == groups
    assert [sum(map(len, part)) for part in cut] == parts


def test_an_sae_and_its_controls_share_a_pass_and_a_rank(pair, capsys):
    limit = {"sweep": SweepConfig(objective="recovered", max_heads=3)}
    two = [*pair("a", **RELU | limit), *pair("b", **JUMPRELU | limit)]
    jobs = [two[0], two[2], two[3], two[1]]
    planned = passes.plan_passes(map(resolve_auto, jobs))
    assert [[job.folder.parent.name for job in each.jobs] for each in planned] == [[*"aa"], [*"bb"]]
    assert "too many controls" not in capsys.readouterr().out
    one = {"sweep": SweepConfig(objective="recovered", max_heads=1)}
    assert len(passes.plan_passes(map(resolve_auto, pair("c", **RELU | one)))) == 2
    assert "too many controls to train together" in capsys.readouterr().out
    assert assign_jobs([1, 1, 1, 1, 3], frozenset(), 2, [[0, 1], [2, 3], [4]]) == [
        [4],
        [0, 1, 2, 3],
    ]
