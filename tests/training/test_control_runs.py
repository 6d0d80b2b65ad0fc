"""Controls in whole runs: beside others, killed, on two ranks, refused, and on known concepts."""

from dataclasses import replace

import pytest
from on_ranks import train_on_ranks
from safetensors.torch import load_file
from test_run import assert_same, kill_after
from tiny_run import synthetic_job

from sae_lightning import UserError, load_sae
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs import passes
from sae_lightning.sae import SAEConfig
from sae_lightning.sae.controls import Control
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.training.settings import CallbacksConfig, ResampleConfig, Splitting


def make_jobs(folder, **trainer) -> list:
    """An SAE and all its controls, as a sweep on one pass. With a target for L0 of their own,
    controls do not depend on the SAE."""
    jobs = []
    for control in (None, *Control):
        name = control.name if control else "trained"
        model = SAEConfig(features=48, control=control)
        job = synthetic_job(folder / name, model=model, loss=ReLULoss(target_l0=4.0))
        job.config.trainer = replace(job.config.trainer, **trainer)
        jobs.append(replace(job, multirun=True, sweep_folder=folder))
    return jobs


@pytest.mark.slow
def test_controls_end_as_when_trained_alone_and_as_if_never_killed(tmp_path, monkeypatch):
    jobs, together = make_jobs(tmp_path / "killed"), make_jobs(tmp_path / "together")
    kill_after(monkeypatch, 33, *jobs)
    passes.train_jobs([replace(job, resumed=True) for job in jobs])
    passes.train_jobs(together)
    alone = make_jobs(tmp_path / "alone")
    for one, killed, other in zip(alone, jobs, together, strict=True):
        passes.train_jobs([replace(one, multirun=False, sweep_folder=None)])
        assert_same(one.folder, other.folder)
        assert_same(killed.folder, other.folder)
        control = one.config.model.control
        saved = load_sae(one.folder).metadata["sae_lightning"]["model.control"]
        assert saved == (control and control.name)


@pytest.mark.slow
def test_on_two_ranks_controls_end_as_on_one(tmp_path):
    one = make_jobs(tmp_path / "one", threads=1)
    shared = make_jobs(tmp_path / "shared", threads=1, devices=2, split=Splitting.none)
    split = make_jobs(tmp_path / "split", threads=1, devices=2, split=Splitting.all)
    passes.train_jobs(one)
    train_on_ranks(shared, split)
    for alone, same, parts in zip(one, shared, split, strict=True):
        files = [job.folder / "sae" / WEIGHTS for job in (alone, same, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()
        expected, found = load_file(files[0]), load_file(files[2])
        for name, x in expected.items():
            assert (x - found[name]).norm() <= 1e-3 * x.norm().clamp_min(1e-6), name


TRANSCODER = LayerConfig(index=0, source=Kind.mlp_in, target=Kind.mlp)
RESAMPLING = CallbacksConfig(resample=ResampleConfig(every=1000))


@pytest.mark.parametrize(
    ("control", "changes", "line"),
    [
        ("pca", {"layer": TRANSCODER}, r"^model\.control=pca has no meaning for a transcoder"),
        ("frozen_encoder", {"callbacks": RESAMPLING}, r"^callbacks\.resample\.every=1000: .*null$"),
        ("frozen_decoder", {"start": "x"}, r"starts from random weights; leave model\.start=x out"),
    ],
)
def test_what_would_undo_a_control_is_refused(tmp_path, control, changes, line):
    model = SAEConfig(features=48, control=Control[control], start=changes.pop("start", None))
    with pytest.raises(UserError, match=line):
        synthetic_job(tmp_path, model=model, **changes)
