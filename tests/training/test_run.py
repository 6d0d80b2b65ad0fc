"""Whole runs: the files they leave, and that interruptions and evaluations change nothing."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
from dataclasses import replace
from tempfile import TemporaryDirectory

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import BATCH, STEPS

from sae_lightning import UserError, load_sae
from sae_lightning.formats.saelens import WEIGHTS
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import Attention, Dtype
from sae_lightning.llm.sites import find_decoder_stack
from sae_lightning.llm.splice import SpliceScores
from sae_lightning.runs import build_heads, folders, passes, run
from sae_lightning.runs.jobs import read_job
from sae_lightning.sae import SAE, SAEConfig
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream import text_source as text
from sae_lightning.training.settings import (
    CallbacksConfig,
    EvalConfig,
    Normalization,
    NormalizeConfig,
    OptimConfig,
    Precision,
    ResampleConfig,
)


def weights(folder):
    return (folder / "sae" / WEIGHTS).read_bytes()


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)


def leaves(tree, path=""):
    """{path: value} of nested dicts and lists, tensors as bytes."""
    if isinstance(tree, torch.Tensor):
        return {path: (tree.dtype, tree.shape, tree.flatten().view(torch.uint8).numpy().tobytes())}
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key in tree for k, v in leaves(tree[key], f"{path}/{key}").items()}


def curves(folder):
    """Every scalar of a run's TensorBoard folder but the speeds: {tag: [(tokens, value)]}."""
    # by second and number of the writer; TensorBoard would read .10 before .9 of the same second
    files = sorted(folder.glob("events*"), key=lambda f: [*map(int, re.findall(r"\d+", f.name))])
    with TemporaryDirectory() as ordered:
        for number, file in enumerate(files):
            shutil.copy(file, f"{ordered}/events.out.tfevents.{number:03}")
        events = EventAccumulator(ordered, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    # a run that died when it had been scored is scored again: the same point twice
    return {tag: sorted({(p.step, p.value) for p in events.Scalars(tag)}) for tag in tags}


def interrupt(monkeypatch, at_step, action):
    """Make the next run call `action()` after update `at_step`."""

    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == at_step:
                action()

    make_callbacks = run.make_callbacks
    monkeypatch.setattr(run, "make_callbacks", lambda *args: [Interrupt(), *make_callbacks(*args)])


class Killed(BaseException):
    """Stands for a killed process: nothing catches it."""


def die():
    raise Killed


def kill_after(monkeypatch, step, *jobs):
    """Train the jobs until the process is killed after update `step`."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, step, die)
        passes.train_jobs([*jobs])


def stop_after(monkeypatch, step, *jobs):
    """Train the jobs until SIGTERM stops them after update `step`."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        passes.train_jobs([*jobs])


def count_products(monkeypatch):
    """A list with one entry per update: whether it used sparse products."""
    ways, before = [], SAE.training_pass

    def training_pass(self, x, only_active=False):
        ways.append(only_active)
        return before(self, x, only_active)

    monkeypatch.setattr(SAE, "training_pass", training_pass)
    return ways


def resume(job):
    again = read_job(job.folder)
    again.resumed = True
    return passes.train_jobs([again])


# dead after five batches and resampled twice, so that resuming has resampling to get right
RESAMPLING = CallbacksConfig(
    dead_after=3 * BATCH, resample=ResampleConfig(every=8 * BATCH, tokens=100)
)


def assert_same(one, other):
    """Weights, Adam's state, the stream's state, metrics and curves are equal bit for bit."""
    assert weights(one) == weights(other)
    for key in ("state_dict", "optimizer_states", "loops"):
        assert leaves(checkpoint(one)[key]) == leaves(checkpoint(other)[key])
    ends = [metrics(folder) for folder in (one, other)]
    for section in ("held_out", "density", "training", "tokens"):
        assert ends[0][section] == ends[1][section]
    assert curves(one) == curves(other)


@pytest.fixture(scope="module")
def whole(common_job):
    """An uninterrupted run with sparsity strong enough to kill features."""
    groups = {"loss": ReLULoss(l1=0.3), "optim": OptimConfig(lr=3e-2), "callbacks": RESAMPLING}
    done = common_job("whole", **groups)
    passes.train_jobs([done])
    return done


@pytest.fixture
def again(whole, tmp_path):
    """again(name) -> the job of that run, not begun, in a folder of that name."""
    return lambda name: replace(whole, folder=tmp_path / name)


@pytest.fixture
def copied(whole, again):
    """The finished run in a folder that the test may change."""
    job = again("copy")
    shutil.copytree(whole.folder, job.folder)
    return job


@pytest.mark.slow
@pytest.mark.parametrize("at_step", [1, 10, 23, STEPS])
def test_a_run_stopped_by_sigterm_saves_says_how_to_continue_and_ends_the_same(
    again, whole, monkeypatch, capsys, at_step
):
    assert max(count for _, count in curves(whole.folder)["train/resampled"]) > 0
    stopped = again("stopped")
    with monkeypatch.context() as patch:
        interrupt(patch, at_step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        if at_step < STEPS:
            with pytest.raises(SystemExit) as end:
                passes.train_jobs([stopped])
            assert end.value.code == 128 + signal.SIGTERM
            assert f"resume={stopped.folder}" in capsys.readouterr().out.replace("\n", "")
            assert checkpoint(stopped.folder)["global_step"] == at_step
        else:
            passes.train_jobs([stopped])
    if at_step < STEPS:
        resume(stopped)
    assert_same(whole.folder, stopped.folder)


@pytest.mark.slow
@pytest.mark.parametrize("at_step", [4, 27])
def test_a_run_that_dies_between_checkpoints_ends_the_same(again, whole, monkeypatch, at_step):
    def power_cut():
        raise SystemError("power cut")

    died = again("died")
    with monkeypatch.context() as patch:
        interrupt(patch, at_step, power_cut)
        with pytest.raises(SystemError):
            passes.train_jobs([died])
    resume(died)
    assert_same(whole.folder, died.folder)


@pytest.mark.slow
def test_ctrl_c_before_the_first_update_stops_at_once_and_not_as_a_success(
    again, whole, monkeypatch, capsys
):
    stopped = again("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(
            "sae_lightning.stream.batches.BatchStream.peek",
            lambda *_: os.kill(os.getpid(), signal.SIGINT),
        )
        with pytest.raises(SystemExit) as end:
            passes.train_jobs([stopped])
    assert end.value.code == 128 + signal.SIGINT
    assert f"resume={stopped.folder}" in capsys.readouterr().out
    assert not (stopped.folder / "checkpoints").exists()
    resume(stopped)
    assert_same(whole.folder, stopped.folder)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_resuming_is_exact_in_either_precision_and_when_repeated(job, monkeypatch, precision):
    ways = count_products(monkeypatch)

    def power_cut():
        raise SystemError("power cut")

    model = SAEConfig(features=48, start_bias=0.0, decoder_norm=0.1)
    changes = {"model": model, "loss": ReLULoss(l1=0.3), "callbacks": RESAMPLING}
    one, other = (job(name, **changes) for name in ("one", "other"))
    for made in (one, other):
        made.config = replace(
            made.config,
            trainer=replace(made.config.trainer, precision=precision),
            data=replace(made.config.data, max_norm=1.2),
        )
    passes.train_jobs([one])
    # dense at first, sparse from some update on, and between the interruptions
    assert 0 < ways.index(True) < 33 and not ways[13] and ways[32]
    for at_step, again in ((13, False), (25, True), (33, True)):
        with monkeypatch.context() as patch:
            interrupt(patch, at_step, power_cut)
            with pytest.raises(SystemError):
                resume(other) if again else passes.train_jobs([other])
    resume(other)
    assert_same(one.folder, other.folder)


@pytest.mark.slow
def test_the_run_folder_says_what_auto_stood_for(job):
    made = job("run")
    made.config = replace(made.config, llm=replace(made.config.llm, dtype=Dtype.auto))
    passes.train_jobs([made])
    written = read_job(made.folder).config
    assert written.llm.dtype is not Dtype.auto
    in_bf16 = written.llm.dtype is Dtype.bfloat16
    assert written.llm.attn is (Attention.eager if in_bf16 else Attention.auto)
    assert written.trainer.precision is not Precision.auto


def test_two_processes_do_not_train_in_one_folder(job):
    made = job("run")
    made.folder.mkdir()
    with open(made.folder / ".lock", "w") as lock:  # as another process would
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            passes.train_jobs([made])
    assert [file.name for file in made.folder.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_trained_over(job, whole):
    with pytest.raises(UserError, match=r"already holds a run: continue it with resume="):
        passes.train_jobs([replace(whole, config=job("whole").config)])


@pytest.mark.slow
def test_damaged_metrics_are_written_again(copied):
    file = copied.folder / "metrics.json"
    before = json.loads(file.read_text())
    file.write_text("{")
    resume(copied)
    after = json.loads(file.read_text())
    assert after["held_out"] == before["held_out"]
    assert "tokens_per_second" not in after["speed"]  # this process has trained nothing


@pytest.mark.slow
def test_a_run_killed_after_its_last_update_is_finished_by_resuming(copied, whole):
    (copied.folder / "metrics.json").unlink()
    resume(copied)
    assert weights(copied.folder) == weights(whole.folder)
    old, new = metrics(whole.folder), metrics(copied.folder)
    assert old["held_out"] == new["held_out"]
    assert old["training"] == new["training"]


@pytest.mark.slow
def test_a_run_killed_between_its_new_checkpoint_and_removing_the_old_stream_leaves_neither(copied):
    (copied.folder / "metrics.json").unlink()
    new = copied.folder / "checkpoints" / f"stream-{STEPS}.pt"
    old = new.with_name("stream-30.pt")
    shutil.copy(new, old)
    resume(copied)
    assert new.exists()
    assert not old.exists()


@pytest.mark.slow
def test_a_finished_run_is_not_touched_by_resuming(whole, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.folder.rglob("*")}
    metrics = resume(whole)
    assert metrics == [json.loads((whole.folder / "metrics.json").read_text())["held_out"]]
    assert {file: file.stat().st_mtime_ns for file in whole.folder.rglob("*")} == before
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_changes_nothing_about_training(job):
    often, never = (
        job(name, eval=EvalConfig(every=every, tokens=150))
        for name, every in (("often", 3 * BATCH), ("never", 10**9))
    )
    passes.train_jobs([often])
    passes.train_jobs([never])
    assert weights(often.folder) == weights(never.folder)
    assert len(curves(often.folder)["held_out/l0"]) == 14  # 13 on the way and one at the end
    assert len(curves(never.folder)["held_out/l0"]) == 1


@pytest.mark.slow
def test_the_seed_decides_everything(job):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        made = job(name, seed=seed)
        made.config.model.seed = seed
        passes.train_jobs([made])
    folder = made.folder.parent
    assert weights(folder / "one") == weights(folder / "same") != weights(folder / "other")


@pytest.mark.slow
@pytest.mark.parametrize("mode", Normalization)
def test_the_saved_sae_does_to_raw_activations_what_the_trained_one_did(
    job, mode, monkeypatch, tiny
):
    """Claim 5: normalisation folded in, on real activations of the LLM."""
    made = job("run", callbacks=CallbacksConfig(normalize=NormalizeConfig(mode=mode)))
    kept = {}
    finish = run.score_and_save
    monkeypatch.setattr(
        run, "score_and_save", lambda *args: kept.update(parts=args[1]) or finish(*args)
    )
    passes.train_jobs([made])
    head = kept["parts"].module.heads[0]
    if mode is not Normalization.none:
        assert not torch.equal(head.in_scale, torch.ones(()))
    ids = torch.randint(2, 60, (8, 16))
    x = capture(tiny("llama").model, ids, [head.source])[head.source].flatten(0, 1)
    loaded, trained = load_sae(made.folder)(x), head.reconstruct_raw(x)
    torch.testing.assert_close(loaded.reconstruction, trained.reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.features, trained.features, rtol=1e-4, atol=1e-5)
    assert trained.features.count_nonzero() > 100


@pytest.mark.slow
def test_without_the_llms_loss_only_the_blocks_below_are_loaded_and_the_sae_is_the_same(
    job, monkeypatch
):
    loaded, load = [], text.load_llm
    monkeypatch.setattr(text, "load_llm", lambda *args: loaded.append(load(*args)) or loaded[-1])
    whole = job("whole")
    changed = {"eval": replace(whole.config.eval, loss_tokens=0)}
    quick = job("quick", **changed)
    (before,), (after,) = passes.train_jobs([whole]), passes.train_jobs([quick])
    assert [len(find_decoder_stack(llm.model)) for llm in loaded] == [3, 2]
    assert before.keys() - after.keys() == {*SpliceScores._fields} - {"ce_error"}
    assert all(after[name] == before[name] for name in after)
    assert len({(each.folder / "sae" / WEIGHTS).read_bytes() for each in (whole, quick)}) == 1
    folder = str(whole.folder.parent / "cache")
    cached = replace(whole.config.data, cache=True, cache_folder=folder)
    passes.train_jobs([job("cached", data=cached, **changed)])
    assert len(find_decoder_stack(loaded[-1].model)) == 3, "the key of a cache is of the whole LLM"


@pytest.mark.slow
def test_a_run_folder_is_complete_and_the_curves_are_plotted_against_tokens(job):
    made = job("run")
    (metrics,) = passes.train_jobs([made])
    folder = made.folder
    assert {file.name for file in folder.iterdir() if "tfevents" not in file.name} == {
        "config.yaml",
        "checkpoints",
        "density.safetensors",
        "metrics.json",
        "sae",
    }
    assert metrics == json.loads((folder / "metrics.json").read_text())["held_out"]
    drawn = curves(folder)
    assert [tokens for tokens, _ in drawn["train/loss"]] == [
        step * BATCH for step in range(4, STEPS + 1, 4)
    ]
    assert {
        *("train/loss", "train/mse", "train/l1", "train/l0", "train/explained_variance"),
        *("train/dead", "optim/lr", "optim/l1", "optim/grad_norm", "decoder/norm_mean"),
        *("data/distinct_sequences", "held_out/ce_clean", "held_out/ce_spliced"),
        *("held_out/ce_zero", "held_out/ce_mean", "held_out/ce_recovered", "held_out/kl"),
        *("held_out/l0", "held_out/explained_variance", "held_out/unfired"),
        *("held_out/duplicates", "held_out/nearest_cosine"),
    } <= set(drawn)
    loss, mse, l1, coefficient = (
        dict(drawn[tag])[STEPS * BATCH]
        for tag in ("train/loss", "train/mse", "train/l1", "optim/l1")
    )
    assert loss == pytest.approx(mse + coefficient * l1, rel=1e-5)
    assert 0 < metrics["l0"] <= 48
    written = json.loads((folder / "metrics.json").read_text())
    assert sum(written["density"].values()) == 48
    assert written["training"]["data/distinct_sequences"] > 1
    speed = written["speed"]
    assert sum(speed[f"{part}_share"] for part in ("llm", "data", "sae")) == pytest.approx(1)
    assert speed["tokens_per_second"] >= speed["tokens_per_second_in_all"] > 0
    assert speed["peak_memory_gb"] > 0.1
    assert metrics["explained_variance"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [{}, {"SLURM_NTASKS_PER_NODE": "4"}])
def test_within_a_cluster_job_of_several_tasks_a_run_trains_by_itself(
    job, monkeypatch, capsys, tasks
):
    zeros = {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
    for name, value in {"SLURM_NTASKS": "4", **zeros, **tasks}.items():
        monkeypatch.setenv(name, value)
    made = job("my run")
    monkeypatch.chdir(made.folder.parent)
    assert passes.train_jobs([made]) == [folders.read_metrics(made.folder)["held_out"]]
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert ["tensorboard", "--logdir", "my run"] in printed
    assert ["python", "analyze.py", "run=my run"] in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": OptimConfig(lr=1e30, clip=None)}, "the loss term|the gradient"),
        ({"optim": OptimConfig(lr=1e30, clip=None, warmup=0)}, "step 1 .*nothing was saved yet"),
        ({"optim": OptimConfig(lr=1e30, clip=None)}, "a lower optim.lr"),
        ({"loss": ReLULoss(l1=1e300)}, r"a lower loss\.l1 \(now 1e\+300\)"),
        ({"loss": ReLULoss(l1=1e25)}, r"a lower loss\.l1 \(now 1e\+25\)"),
    ],
)
def test_a_loss_that_is_no_longer_finite_stops_the_run_and_names_the_term(job, changes, message):
    with pytest.raises(UserError, match=message):
        passes.train_jobs([job("run", **changes)])


@pytest.mark.slow
def test_a_late_divergence_leaves_the_last_good_checkpoint(job, monkeypatch):
    made = job("run")

    def poison():
        kept["head"].sae.W_dec.data[3, 5] = float("nan")

    kept = {}
    build_head = build_heads.make_head
    monkeypatch.setattr(
        build_heads, "make_head", lambda *args: kept.setdefault("head", build_head(*args))
    )
    interrupt(monkeypatch, 15, poison)
    with pytest.raises(UserError, match=r"step 15 .*last\.ckpt.*lower optim\.lr"):
        passes.train_jobs([made])
    saved = checkpoint(made.folder)
    assert saved["global_step"] == 10
    tensors = [t for t in saved["state_dict"].values() if isinstance(t, torch.Tensor)]
    assert len(tensors) > 8
    assert all(tensor.isfinite().all() for tensor in tensors)
