"""Warm starts and kept SAEs on two ranks, in real processes, as on one."""

from dataclasses import replace

import pytest
import torch
from on_ranks import train_on_ranks
from safetensors.torch import load_file
from test_run import checkpoint
from tiny_run import WORLD_BATCH as BATCH
from tiny_run import fill_from_start, synthetic_job

from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.runs import folders, passes
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.training.settings import Splitting

pytestmark = pytest.mark.slow
KINDS = {"jumprelu": {}, "matryoshka": {"k": 4, "groups": [0.25]}}


def make_jobs(base, ranks: int, split=Splitting.none) -> list:
    """A grown and a plain warm start, and a cold one, as one sweep."""
    jobs = []
    for (name, settings), features in zip(KINDS.items(), (61, 48), strict=True):
        row = ARCHITECTURES[name]
        options = settings | {"features": features, "start": str(base / name)}
        changes = {"model": row.config(name=name, **options), "loss": row.loss()}
        job = synthetic_job(base / f"{ranks}" / name, **changes)
        job.config = fill_from_start(job.config, [f"model.features={features}"])
        jobs.append(job)
    jobs.append(synthetic_job(base / f"{ranks}" / "cold"))
    for job in jobs:
        options = {"devices": ranks, "split": split, "threads": 1, "tokens": 20 * BATCH}
        job.config.trainer = replace(job.config.trainer, keep_every=10 * BATCH, **options)
    return [replace(job, multirun=True, sweep_folder=base / f"{ranks}") for job in jobs]


def test_on_two_ranks_warm_heads_end_as_on_one(tmp_path):
    for name, settings in KINDS.items():
        row = ARCHITECTURES[name]
        model = row.config(name=name, features=48, **settings)
        passes.train_jobs([synthetic_job(tmp_path / name, model=model, loss=row.loss())])
    one, two = make_jobs(tmp_path, 1), make_jobs(tmp_path, 2, Splitting.all)
    shared = [
        replace(job, folder=tmp_path / "shared" / job.folder.name, sweep_folder=tmp_path / "shared")
        for job in make_jobs(tmp_path, 2)
    ]
    passes.train_jobs(one)
    train_on_ranks(two, shared)
    for alone, split, other in zip(one, two, shared, strict=True):
        for sae in ("sae-1280", "sae"):
            files = [job.folder / sae / WEIGHTS for job in (alone, split, other)]
            assert files[0].read_bytes() == files[2].read_bytes()
            expected, found = load_file(files[0]), load_file(files[1])
            for name, x in expected.items():
                assert (x - found[name]).norm() <= 1e-4 * x.norm().clamp_min(1e-6), name
        metrics = [folders.read_metrics(job.folder) for job in (alone, split, other)]
        if "cold" in alone.folder.name:
            continue
        assert metrics[0]["fates"] == metrics[1]["fates"] == metrics[2]["fates"]
        assert metrics[1]["start"] == pytest.approx(metrics[0]["start"], rel=1e-4)
        saved = [checkpoint(job.folder)["state_dict"] for job in (alone, split)]
        for name in ("heads.0.start_rows", "heads.0.start_fired"):
            assert torch.equal(saved[0][name], saved[1][name])
