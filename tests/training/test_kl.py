"""Fine-tuning on the KL (`loss.kl`): exact to resume, alone as in a sweep, and it lowers the KL."""

import json
from dataclasses import replace

import pytest
from test_group import Killed, die
from test_run import assert_same, curves, interrupt, weights
from tiny_run import BATCH, STEPS

from sae_lightning import UserError
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs import passes
from sae_lightning.runs.checks import check_jobs
from sae_lightning.sae.batch_topk import BatchTopK
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.sae.topk import TopKConfig
from sae_lightning.training.settings import EvalConfig

TRANSCODER = {
    "layer": LayerConfig(index=1, source=Kind.mlp_in, target=Kind.mlp),
    "model": TopKConfig(name="batch_topk", features=48, k=4),
    "loss": AuxKLoss(kl=1.0, kl_from=0.5),
}
MIX = {
    "plain": {},
    "tuned": {"loss": ReLULoss(l1=1e-2, kl=1.0, kl_from=0.5)},
    "later": {"loss": ReLULoss(l1=1e-2, kl=0.5, kl_from=0.7)},
    "transcoder": TRANSCODER,
}


@pytest.fixture
def sweep(job, tmp_path):
    """sweep(name) -> new jobs, one for each of MIX."""

    def make(name: str):
        made = [job(f"{name}/{each}", **changes) for each, changes in MIX.items()]
        return [
            replace(one, multirun=True, sweep_folder=tmp_path / name, overrides=[]) for one in made
        ]

    return make


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_in_a_sweep_each_head_ends_as_alone_and_says_what_it_was_before(sweep):
    together = sweep("together")
    passes.train_jobs(together)
    for one, alone in zip(together, sweep("alone"), strict=True):
        passes.train_jobs([alone])
        assert_same(one.folder, alone.folder)
        begun = one.config.tuned_from
        assert ("before_kl" in read_metrics(one.folder)) == (begun is not None)
        if begun is None:
            continue
        scored = curves(one.folder)
        assert begun in (20, 28)
        before = {name: value for name, value in read_metrics(one.folder)["before_kl"].items()}
        assert (begun * BATCH, pytest.approx(before["kl"], rel=1e-6)) in scored["held_out/kl"]
        assert min(tokens for tokens, _ in scored["train/kl"]) == (begun + 4) * BATCH
    assert len({weights(one.folder) for one in together}) == len(MIX)
