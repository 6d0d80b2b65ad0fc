"""Fine-tuning on the KL (`loss.kl`): exact to resume, alone as in a sweep, and it lowers the KL."""

from dataclasses import replace

import pytest
import torch
from on_ranks import train_on_ranks
from safetensors.torch import load_file
from test_run import assert_same, curves, kill_after, metrics, weights
from tiny_run import BATCH, synthetic_job

from sae_lightning import UserError
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.llm.capture import capture
from sae_lightning.llm.sites import Kind, LayerConfig
from sae_lightning.runs import passes
from sae_lightning.runs.checks import check_jobs
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.sae.objective import AuxKLoss
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.sae.topk import TopKConfig
from sae_lightning.stream.tuning_text import TuningText
from sae_lightning.training.settings import EvalConfig, Precision, Splitting

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


def make_sweep(job, name: str) -> list:
    """New jobs, one for each of MIX."""
    made = [job(f"{name}/{each}", **changes) for each, changes in MIX.items()]
    return [
        replace(one, multirun=True, sweep_folder=one.folder.parent, overrides=[]) for one in made
    ]


@pytest.fixture
def sweep(job):
    """sweep(name) -> new jobs, one for each of MIX."""
    return lambda name: make_sweep(job, name)


@pytest.fixture(scope="module")
def together(common_job):
    """An uninterrupted sweep."""
    jobs = make_sweep(common_job, "together")
    passes.train_jobs(jobs)
    return jobs


@pytest.mark.slow
def test_in_a_sweep_each_head_ends_as_alone_and_says_what_it_was_before(sweep, together):
    for one, alone in zip(together, sweep("alone"), strict=True):
        passes.train_jobs([alone])
        assert_same(one.folder, alone.folder)
        begun = one.config.tuned_from
        assert ("before_kl" in metrics(one.folder)) == (begun is not None)
        if begun is None:
            continue
        scored = curves(one.folder)
        assert begun in (20, 28)
        before = metrics(one.folder)["before_kl"]
        assert (begun * BATCH, pytest.approx(before["kl"], rel=1e-6)) in scored["held_out/kl"]
        assert min(tokens for tokens, _ in scored["train/kl"]) == (begun + 4) * BATCH
    assert len({weights(one.folder) for one in together}) == len(MIX)


@pytest.mark.slow
def test_killed_before_as_and_after_it_begins_a_run_ends_as_if_it_had_not_been(
    sweep, together, monkeypatch
):
    jobs = sweep("killed")
    for step in (15, 20, 25, 33):
        kill_after(monkeypatch, step, *jobs)
        jobs = [replace(one, resumed=True) for one in jobs]
    passes.train_jobs(jobs)
    for one, other in zip(together, jobs, strict=True):
        assert_same(one.folder, other.folder)
        before = [metrics(each.folder).get("before_kl") for each in (one, other)]
        assert before[0] == before[1]


@pytest.mark.slow
def test_until_it_begins_a_head_is_the_same_and_then_the_sum_keeps_the_size_of_the_mse(
    job, monkeypatch
):
    """loss = (mse + kl x mse / KL x KL) / (1 + kl) + l1 x penalty = mse + l1 x penalty."""
    trainer = replace(job("x").config.trainer, keep_every=20 * BATCH)
    tuned = job("tuned", trainer=trainer, loss=ReLULoss(l1=1e-2, kl=3.0, kl_from=0.5))
    passes.train_jobs([tuned])
    monkeypatch.delattr(TuningText, "run_update")  # the LLM runs for heads with `loss.kl` only
    plain = job("plain", trainer=trainer)
    passes.train_jobs([plain])
    first, other = (
        (one.folder / f"sae-{20 * BATCH}" / WEIGHTS).read_bytes() for one in (plain, tuned)
    )
    assert first == other
    assert weights(plain.folder) != weights(tuned.folder)
    scalars, rates = curves(tuned.folder), dict(curves(plain.folder)["optim/lr"])
    for tokens, rate in scalars["optim/lr"]:
        factor = 0.1 if tokens > 20 * BATCH else 1
        assert rate == pytest.approx(factor * rates[tokens], rel=1e-6)
    assert len(scalars["train/kl"]) == 5  # of 20 updates, every fourth
    for name in ("loss", "mse", "l1"):
        scalars[name] = dict(scalars[f"train/{name}"])
    for tokens, _ in scalars["train/kl"]:
        total = scalars["mse"][tokens] + 1e-2 * scalars["l1"][tokens]
        assert scalars["loss"][tokens] == pytest.approx(total, rel=1e-5)


def test_every_update_gets_the_next_sequences_of_the_training_text(job):
    """Those of update 2 are the same whether or not those of updates 0 and 1 were read."""
    source = job("x").config.data_source
    llm, text = source.open_llm()
    expected = text.train.reopen().next(15).tokens
    made = [TuningText(llm, text.train, [], batch=2) for _ in range(2)]
    runs = [made[0].run_update(7, update, 70) for update in (7, 8, 9)]  # 70 / 15 tokens: 5
    assert [len(run.tokens) for run in runs[0]] == [2, 2, 1]
    read = torch.cat([run.tokens for update in runs for run in update])
    torch.testing.assert_close(read, expected)
    resumed = made[1].run_update(7, 9, 70)
    for one, other in zip(runs[2], resumed, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.output.last_hidden_state, other.output.last_hidden_state)
    kept = torch.cat([run.keep for run in resumed])
    assert kept[:, 1:].all()
    assert not kept[:, 0].any()


def test_tokens_that_training_drops_are_not_replaced(job):
    data = replace(job("x").config.data, max_norm=1.2)
    one = job("max_norm", data=data, loss=ReLULoss(l1=1e-2, kl=1.0, kl_from=0.5))
    llm, text = one.config.data_source.open_llm()
    site = LayerConfig(index=1).resolve_sites(3).source
    made = TuningText(llm, text.train, [site], batch=2, max_norm=1.2)
    (run,) = made.run_update(0, 0, 30)
    norms = capture(llm.model, run.tokens, [site])[site].norm(dim=-1)
    usual = norms <= 1.2 * norms[:, 1:].median()
    usual[:, 0] = False
    assert torch.equal(run.keep, usual)
    assert 5 < int(usual.sum()) < 28


@pytest.mark.slow
def test_on_two_ranks_heads_end_as_on_one(sweep, tmp_path):
    """Bit for bit if they are shared out, up to rounding if they are split."""
    one, shared, split = sweep("one"), sweep("shared"), sweep("split")
    ways = (one, 1, Splitting.none), (shared, 2, Splitting.none), (split, 2, Splitting.all)
    for jobs, ranks, splitting in ways:
        for each in jobs:
            options = {"devices": ranks, "split": splitting, "threads": 1}
            options["precision"] = Precision.fp32
            each.config.trainer = replace(each.config.trainer, **options)
    passes.train_jobs(one)
    train_on_ranks(shared, split)
    for alone, other, parted in zip(one, shared, split, strict=True):
        assert weights(alone.folder) == weights(other.folder)
        files = [job.folder / "sae" / WEIGHTS for job in (alone, parted)]
        expected, found = map(load_file, files)
        for name, x in expected.items():
            assert (x - found[name]).norm() <= 1e-3 * x.norm().clamp_min(1e-6), name
        before = [metrics(job.folder).get("before_kl") for job in (alone, other, parted)]
        assert before[0] == before[1]
        assert before[2] == (before[0] and pytest.approx(before[0], rel=1e-3))


@pytest.mark.slow
def test_it_lowers_the_kl_on_held_out_text(job):
    given = {"trainer": replace(job("x").config.trainer, tokens=400 * BATCH)}
    given |= {"eval": EvalConfig(every=400 * BATCH, tokens=600)}
    given |= {"model": TopKConfig(name="topk", features=48, k=4)}
    tuned, plain = AuxKLoss(kl=1.0, kl_from=0.5, kl_lr=1.0), AuxKLoss()
    jobs = [job(f"sweep/{loss.kl}", loss=loss, **given) for loss in (tuned, plain)]
    passes.train_jobs([replace(one, multirun=True, sweep_folder=one.folder.parent) for one in jobs])
    scores, other = (metrics(one.folder) for one in jobs)
    before, after, plain = scores["before_kl"], scores["held_out"], other["held_out"]
    assert after["kl"] < 0.9 * plain["kl"]
    assert after["kl"] < before["kl"]
    assert after["l0"] == plain["l0"]


def test_without_predictions_it_is_refused(job, tmp_path):
    loss = ReLULoss(kl=1.0)
    with pytest.raises(UserError, match="loss.kl=1.0 .* with data=synthetic there is no LLM"):
        check_jobs([synthetic_job(tmp_path / "synthetic", loss=loss)])
    with pytest.raises(UserError, match="loss.kl=1.0 needs the whole LLM"):
        check_jobs([job("cut", loss=loss, eval=EvalConfig(loss_tokens=0))])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kl": -1.0}, "loss.kl=-1.0: give a number that is 0 or more, such as 1"),
        ({"kl": 1.0, "kl_from": 1.0}, "loss.kl_from=1.0: give a share of the run"),
        ({"kl": 1.0, "kl_lr": 0.0}, "loss.kl_lr=0.0: give a positive factor"),
        ({"kl_from": 0.5}, "loss.kl_from=0.5 has no effect with loss.kl=0"),
        ({"kl_lr": 1.0}, "loss.kl_lr=1.0 has no effect with loss.kl=0"),
    ],
)
@pytest.mark.parametrize("loss", [row.loss for row in ARCHITECTURES.values()])
def test_settings_without_a_meaning_are_refused(loss, settings, line):
    with pytest.raises(UserError, match=line):
        loss(**settings)
