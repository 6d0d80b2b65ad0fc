"""Claim 3: runs on several ranks end as on one, in real processes that talk through gloo."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from forked import ROOT
from on_ranks import start_on_ranks, train_on_ranks
from safetensors.torch import load_file
from test_group import MIX
from test_run import checkpoint, curves, leaves, weights
from tiny_run import BATCH, tiny_job, write_text

from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.llm.load import Dtype, LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs import folders
from sae_lightning.runs.jobs import read_job, read_sweep
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream.synthetic import SyntheticConfig
from sae_lightning.training.settings import (
    CallbacksConfig,
    OptimConfig,
    Precision,
    ResampleConfig,
    Splitting,
)

pytestmark = pytest.mark.slow
WHOLE, SPLIT = Splitting.none, Splitting.all
SYNTHETIC = {
    "llm": LLMConfig(name="none", dtype=Dtype.float32, device="cpu"),
    "layer": LayerConfig(index=0),
    "data": SyntheticConfig(concepts=64, dim=24, l0=3, pool=4096),
}
# resampled when it is scored and saved, while another head is not
DUE = {
    "callbacks": CallbacksConfig(
        dead_after=3 * BATCH, resample=ResampleConfig(every=30 * BATCH, tokens=100, until=1.0)
    ),
    "loss": ReLULoss(l1=0.3),
    "optim": OptimConfig(lr=3e-2),
}
FEW = {name: MIX[name] for name in ("relu", "batch_topk", "jumprelu")}


@pytest.fixture(scope="module")
def make(tiny_folder, tmp_path_factory):
    """make(name, ranks, {job: groups}, split) -> the jobs of a sweep in a folder of that name; one
    job alone is a plain run."""
    base = tmp_path_factory.mktemp("devices")
    (base / "text").mkdir()
    text = write_text(base / "text")

    def make(name, ranks, mix, split=Splitting.auto, precision=Precision.fp32, **data):
        jobs = []
        for each, groups in mix.items():
            job = tiny_job(tiny_folder("llama"), text, base / name / each)
            job.config = replace(job.config, **groups)
            job.config.data = replace(job.config.data, **data)
            options = {"devices": ranks, "split": split, "precision": precision, "threads": 1}
            job.config.trainer = replace(job.config.trainer, **options)
            jobs.append(job)
        if len(jobs) == 1:
            return jobs
        sweep = {"multirun": True, "sweep_folder": base / name}
        return [replace(job, **sweep) for job in jobs]

    make.base = base
    return make


@pytest.fixture(scope="module")
def done(make):
    """{ranks: {case: jobs}}: every case, trained on 1 and 2 ranks, and two of them on 3."""
    done = {}
    for ranks in (1, 2, 3):
        cache = {"cache": True, "cache_folder": str(make.base / f"cache{ranks}")}
        two_sites = {"a": {}, "b": MIX["topk"]}
        bad = {"optim": OptimConfig(lr=1e30, clip=None)}
        cases = {
            "sweep": (MIX, WHOLE),
            "bf16": (FEW, WHOLE, Precision.bf16),
            "alone": ({"one": {}}, WHOLE),  # every other rank trains a copy
            "synthetic": ({"a": SYNTHETIC, "b": SYNTHETIC | {"loss": ReLULoss(l1=0.1)}},),
            "uneven": ({"a": DUE, "b": {}},),
            "norms": ({"a": {}, "b": {"loss": ReLULoss(l1=0.1)}},),
            "written": (two_sites,),
            "read": (two_sites,),
            "failing": ({"a": {}, "b": bad, "c": MIX["topk"]},),
        }
        if ranks > 1:
            cases["split"] = (MIX, SPLIT)
            cases["split_bf16"] = (FEW, SPLIT, Precision.bf16)
            cases["split_synthetic"] = ({"a": SYNTHETIC},)
        if ranks == 3:
            cases = {case: cases[case] for case in ("sweep", "split")}
        data = {"norms": {"max_norm": 1.3}, "written": cache, "read": cache}
        jobs = {
            case: make(f"{case}{ranks}", ranks, *settings, **data.get(case, {}))
            for case, settings in cases.items()
        }
        done[ranks] = jobs | {"ran": train_on_ranks(*jobs.values())}
    return done


def assert_same_files(one, other):
    """Weights, checkpoint, metrics and curves of two runs are equal bit for bit."""
    assert weights(one) == weights(other)
    saved = [checkpoint(folder) for folder in (one, other)]
    for state in saved:  # the pool holds the sites of a rank's heads only
        (stream,) = state["loops"]["fit_loop"]["state_dict"].pop("combined_loader") or [None]
        assert stream is None
    for key in ("state_dict", "optimizer_states", "loops"):
        assert leaves(saved[0][key]) == leaves(saved[1][key])
    metrics = [folders.read_metrics(folder) for folder in (one, other)]
    for section in ("held_out", "density", "training", "tokens"):
        assert repr(metrics[0][section]) == repr(metrics[1][section])  # NaN is equal to itself
    assert curves(one) == curves(other)
    assert list_files(one) == list_files(other)


def list_files(folder):
    names = (str(file.relative_to(folder)) for file in folder.rglob("*"))
    return {name.partition("tfevents")[0] for name in names}  # a resumed run has several


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (case, 2)
        for case in ("sweep", "bf16", "alone", "synthetic", "uneven", "norms", "written", "read")
    ]
    + [("sweep", 3)],
)
def test_saes_that_are_shared_out_end_with_the_same_bytes(done, case, ranks):
    for one, other in zip(done[1][case], done[ranks][case], strict=True):
        assert_same_files(one.folder, other.folder)


def test_a_cache_is_written_once_and_then_read(done, make):
    for ranks in (1, 2):
        assert done[ranks]["ran"].stdout.count("tokens are read from the activation cache") == 1
        shards = [file.name for file in (make.base / f"cache{ranks}").rglob("*.safetensors")]
        assert len(shards) == len(set(shards)) > 0
    assert_same_files(done[1]["read"][1].folder, done[2]["written"][1].folder)


def assert_close(one, other, share, metrics):
    """Weights are equal up to `share` of their norm, held-out metrics up to `metrics`."""
    saved = [load_file(folder / "sae" / WEIGHTS) for folder in (one, other)]
    for name, x in saved[0].items():
        assert saved[1][name].shape == x.shape
        assert (x - saved[1][name]).norm() <= share * x.norm().clamp_min(1e-6), name
    first, second = (folders.read_metrics(folder)["held_out"] for folder in (one, other))
    assert first.keys() == second.keys()
    for name in ("l0", "explained_variance", "unfired", "duplicates", "ce_spliced", "recovered"):
        if name in first:
            assert second[name] == pytest.approx(first[name], rel=metrics, abs=metrics), name
    assert list_files(one) == list_files(other)


@pytest.mark.parametrize("ranks", [2, 3])
def test_saes_that_are_split_by_features_end_the_same_up_to_rounding(done, ranks):
    for one, other in zip(done[1]["sweep"], done[ranks]["split"], strict=True):
        assert_close(one.folder, other.folder, 1e-4, 1e-4)
        saved = [checkpoint(job.folder)["optimizer_states"][0]["state"] for job in (one, other)]
        for number, state in saved[0].items():
            for name in ("exp_avg", "exp_avg_sq"):
                x, y = state[name], saved[1][number][name]
                assert x.stride() == y.stride()
                torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3 * x.abs().max().item())
    if ranks == 2:
        one, split = (done[1]["synthetic"][0], done[2]["split_synthetic"][0])
        assert_close(one.folder, split.folder, 1e-4, 1e-4)


def test_in_bf16_split_saes_are_about_as_good(done):
    """In bf16 many values tie: a tie may go to another feature, and resampling, which all of these
    do, may draw another token. (tests/sae/test_split.py compares losses and gradients.)"""
    for one, other in zip(done[1]["bf16"], done[2]["split_bf16"], strict=True):
        first, second = (folders.read_metrics(job.folder)["held_out"] for job in (one, other))
        assert second["explained_variance"] == pytest.approx(first["explained_variance"], abs=0.05)
        assert second["l0"] == pytest.approx(first["l0"], rel=0.1, abs=0.3)


def test_a_head_that_fails_on_another_rank_is_told_by_the_first(done):
    for one, other in zip(done[1]["failing"], done[2]["failing"], strict=True):
        if one.folder.name == "b":
            assert folders.read_failure(other.folder)["diverged"]
        else:
            assert_same_files(one.folder, other.folder)
    assert done[2]["ran"].stdout.count("b: stopped at step") == 1


def continue_on(ranks, job):
    job.config.trainer = replace(job.config.trainer, devices=ranks)
    return replace(job, resumed=True)


@pytest.fixture(scope="module")
def stopped(make):
    """Folders of a shared and of a split sweep that SIGTERM stopped on 3 ranks."""
    for name, split in (("shared", WHOLE), ("parted", SPLIT)):
        jobs = make(f"stopped_{name}", 3, FEW, split)
        process = start_on_ranks(jobs)
        process.wait_for("training  20%")
        os.kill(process.pid, signal.SIGTERM)
        ended = process.wait()
        assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
        assert ended.stdout.count("stopped by SIGTERM and saved at") == 1
        assert not any(job.folder.joinpath("metrics.json").exists() for job in jobs)
    return make.base


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_that_is_stopped_on_three_ranks_goes_on_with_another_number(done, stopped, ranks):
    lists = []
    for name in ("shared", "parted"):
        folder = shutil.copytree(stopped / f"stopped_{name}", stopped / f"{name}{ranks}")
        lists.append([continue_on(ranks, job) for job in read_sweep(folder)])
    train_on_ranks(*lists)
    for job in done[1]["sweep"]:
        if job.folder.name in FEW:
            assert_same_files(job.folder, stopped / f"shared{ranks}" / job.folder.name)
            assert_close(job.folder, stopped / f"parted{ranks}" / job.folder.name, 1e-4, 1e-4)


@pytest.mark.parametrize("killed", ["follower", "first"])
def test_when_a_rank_is_killed_all_end_and_the_run_goes_on_from_its_checkpoint(done, make, killed):
    (job,) = make(f"killed_{killed}", 2, {"one": {}}, WHOLE)
    process = start_on_ranks([job])
    process.wait_for("training  50%")
    (follower,) = psutil.Process(process.pid).children()
    lost = follower if killed == "follower" else process
    lost.kill()
    gone, alive = psutil.wait_procs([follower], timeout=60)
    assert not alive
    ended = process.wait()
    assert ended.returncode != 0
    if killed == "follower":
        assert ended.stderr.count("rank 1 (process ") == 1
        assert f"continue with: python train.py resume={job.folder}" in ended.stderr
        assert "has ended" in folders.read_failure(job.folder)["reason"]
    else:
        assert ended.stderr.count("rank 0 ") == 1
    train_on_ranks([continue_on(2, read_job(job.folder))])
    assert_same_files(done[1]["alone"][0].folder, job.folder)


def test_a_rank_that_hangs_is_named(make):
    (job,) = make("hanging", 2, {"one": {}}, WHOLE)
    job.config.trainer = replace(job.config.trainer, patience=10)
    process = start_on_ranks([job])
    process.wait_for("training  20%")
    (follower,) = psutil.Process(process.pid).children()
    follower.suspend()
    began = time.monotonic()
    ended = process.wait()
    assert time.monotonic() - began < 60
    assert ended.returncode != 0
    assert ended.stderr.count(f"rank 1 (process {follower.pid} on ") == 1
    assert not psutil.pid_exists(follower.pid)


SETTINGS = [
    "data=synthetic",
    "data.concepts=64",
    "data.dim=16",
    "data.l0=3",
    "data.pool=1024",
    "trainer=cpu",
    "trainer.tokens=4096",
    "trainer.batch=256",
    "eval.tokens=512",
    "model.features=32",
]


def test_torchrun_and_the_plain_command_leave_one_sweep_with_the_same_saes(tmp_path):
    train = [str(ROOT / "train.py"), "-m", *SETTINGS, "loss.l1=1e-3,1e-2"]
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=2"]
    saes = []
    for name, command in {
        "one": [sys.executable, *train],
        "plain": [sys.executable, *train, "trainer.devices=2"],
        "torchrun": [*torchrun, *train],
    }.items():
        (tmp_path / name).mkdir()
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, env=env, cwd=tmp_path / name, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("on the Pareto front") == 1
        assert "rank" not in ended.stderr
        (sweep,) = (tmp_path / name / "multirun").glob("*/*")
        saes.append({file.parent.parent.name: file.read_bytes() for file in sweep.rglob(WEIGHTS)})
        assert os.listdir(tmp_path / name) == ["multirun"]
    assert len(saes[0]) == 2
    assert saes[0] == saes[1] == saes[2]
