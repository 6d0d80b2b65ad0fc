"""Claim 3: runs on several ranks end as on one, in real processes that talk through gloo."""

import os
from dataclasses import replace

import pytest
from on_ranks import train_on_ranks
from test_group import MIX
from test_run import checkpoint, curves, leaves, weights
from tiny_run import tiny_job, write_text

from sae_lightning.llm.load import Dtype, LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs import folders
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream.synthetic import SyntheticConfig
from sae_lightning.training.settings import OptimConfig, Precision, Splitting

pytestmark = pytest.mark.slow
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def make(tiny_folder, tmp_path_factory):
    """make(sweep, ranks, {job: groups}, **groups of all) -> jobs in a sweep folder."""
    base = tmp_path_factory.mktemp("devices")
    (base / "text").mkdir()
    text = write_text(base / "text")

    def make(name, ranks, mix, split=Splitting.auto, precision=Precision.fp32, **changes):
        jobs = []
        for each, groups in mix.items():
            job = tiny_job(tiny_folder("llama"), text, base / name / each)
            job.config = replace(job.config, **changes | groups)
            job.config.trainer = replace(
                job.config.trainer, devices=ranks, split=split, precision=precision, threads=1
            )
            many = len(mix) > 1
            sweep = base / name if many else None
            jobs.append(replace(job, multirun=many, sweep_folder=sweep, overrides=[]))
        return jobs

    make.base = base
    return make


ONE = {"one": {}}
SYNTHETIC = {
    "llm": LLMConfig(name="none", dtype=Dtype.float32, device="cpu"),
    "layer": LayerConfig(index=0),
    "data": SyntheticConfig(concepts=64, dim=24, l0=3, pool=4096),
}


def text_settings(job, **changes):
    job.config.data = replace(job.config.data, **changes)
    return job


@pytest.fixture(scope="module")
def done(make):
    """{ranks: {name: jobs}} of all cases, trained on 1, 2 and 3 ranks, and what was printed."""
    done = {}
    for ranks in (1, 2, 3):
        cases = {
            "sweep": make(f"sweep{ranks}", ranks, MIX, Splitting.none),
            "bf16": make(f"bf16{ranks}", ranks, MIX, Splitting.none, Precision.bf16),
            "split": make(f"split{ranks}", ranks, MIX, Splitting.all),
            "split_bf16": make(f"splitbf16{ranks}", ranks, MIX, Splitting.all, Precision.bf16),
            "alone": make(f"alone{ranks}", ranks, ONE, Splitting.none),
            "synthetic": make(f"synthetic{ranks}", ranks, {"a": SYNTHETIC, "b": SYNTHETIC}),
            "norms": make(f"norms{ranks}", ranks, {"a": {}, "b": {"loss": ReLULoss(l1=0.1)}}),
            "written": make(f"written{ranks}", ranks, {"a": {}, "b": MIX["topk"]}),
            "read": make(f"read{ranks}", ranks, {"a": {}, "b": MIX["topk"]}),
            "failing": make(
                f"failing{ranks}",
                ranks,
                {"a": {}, "b": {"optim": OptimConfig(lr=1e30, clip=None)}, "c": MIX["topk"]},
            ),
        }
        for job in cases["norms"]:
            text_settings(job, max_norm=1.3)
        for job in cases["written"] + cases["read"]:
            text_settings(job, cache=True, cache_folder=str(make.base / f"cache{ranks}"))
        file = make.base / f"{ranks}.pickle"
        ran = train_on_ranks(file, *cases.values(), timeout=900)
        assert ran.returncode == 0, ran.stderr
        done[ranks] = cases | {"ran": ran}
    return done


def assert_same_files(one, other):
    """Weights, checkpoint, metrics and curves of two runs are equal bit for bit."""
    assert weights(one) == weights(other)
    for key in ("state_dict", "optimizer_states", "loops"):
        saved = [checkpoint(folder)[key] for folder in (one, other)]
        if key == "loops":
            for loops in saved:  # the pool holds the sites of this rank's heads only
                loops["fit_loop"]["state_dict"].pop("combined_loader", None)
        assert leaves(saved[0]) == leaves(saved[1])
    metrics = [folders.read_metrics(folder) for folder in (one, other)]
    for section in ("held_out", "density", "training", "tokens"):
        assert repr(metrics[0][section]) == repr(metrics[1][section])
    assert curves(one) == curves(other)
    assert files(one) == files(other)


def files(folder):
    return sorted(
        str(file.relative_to(folder)).partition("events.")[0] for file in folder.rglob("*")
    )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "case", ["sweep", "bf16", "alone", "synthetic", "norms", "written", "read"]
)
def test_heads_that_are_shared_out_end_with_the_same_bytes(done, ranks, case):
    for one, other in zip(done[1][case], done[ranks][case], strict=True):
        assert_same_files(one.folder, other.folder)
