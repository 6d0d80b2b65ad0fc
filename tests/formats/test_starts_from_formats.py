"""Training starts from every format that is read, with the score of the SAE in it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_formats import BY_HAND
from tiny_run import WORLD_BATCH as BATCH
from tiny_run import fill_from_start, synthetic_job

from sae_lightning import load_sae
from sae_lightning.analysis.evaluate import evaluate
from sae_lightning.formats.table import FORMATS
from sae_lightning.llm.sites import Kind, LayerConfig, distinct_sites
from sae_lightning.runs import passes
from sae_lightning.runs.search import SweepConfig
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream.activations import ActivationsConfig

ACROSS = LayerConfig(index=0, source=Kind.mlp_in, target=Kind.mlp)


def make_job(folder, name: str):
    """A job of two updates on activations of two dimensions, which starts from the folder that
    tests/formats/test_formats.py writes by hand."""
    (folder / name).mkdir()
    _, _, architecture, _, layer = BY_HAND[name]
    row, file = ARCHITECTURES[architecture], BY_HAND[name][0](folder / name)
    job = synthetic_job(
        folder / "sweep" / name,
        data=ActivationsConfig(path=str(folder / "x.safetensors"), pool=1024, held_out=0.3),
        layer=LayerConfig(index=0) if layer.target is None else ACROSS,
        model=row.config(name=architecture, start=str(file)),
        loss=row.loss(),
        sweep=SweepConfig(),
    )
    job.config.trainer = replace(job.config.trainer, tokens=2 * BATCH)
    job.config = fill_from_start(job.config, [])
    return replace(job, sweep_folder=folder / "sweep")


@pytest.mark.slow
def test_the_first_held_out_score_is_that_of_the_saved_sae(tmp_path):
    random = torch.Generator().manual_seed(0)
    matrices = {
        site: 3 * torch.randn(3000, 2, generator=random) + 1 for site in ("resid", "mlp_in", "mlp")
    }
    save_file({f"{site}.0": x for site, x in matrices.items()}, tmp_path / "x.safetensors")
    jobs = [make_job(tmp_path, name) for name in FORMATS]
    passes.train_jobs(jobs)
    for job in jobs:
        sites = job.config.layer.resolve_sites(1)
        held_out = job.config.data_source.open_held_out(distinct_sites([sites]), 2000, 0)
        expected = evaluate(load_sae(job.config.model.start), held_out, sites).card.scalars()
        metrics = json.loads((job.folder / "metrics.json").read_text())
        assert metrics["start"] == pytest.approx(expected, rel=1e-4, abs=1e-6), job.folder
        assert expected["l0"] > 0
        assert sum(metrics["fates"].values()) == 3
