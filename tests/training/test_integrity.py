"""A whole checkpoint is checked before a resumed run changes a file or loads an LLM."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run import assert_same, interrupt, leaves, resume
from tiny_run import STEPS, tiny_job, write_text

from sae_lightning import UserError
from sae_lightning.llm import load
from sae_lightning.runs import checks, passes
from sae_lightning.runs.jobs import read_job
from sae_lightning.stream.synthetic import SyntheticConfig

STEP = 10


@pytest.fixture(scope="module")
def killed(tiny_folder, tmp_path_factory):
    """Run folders of jobs killed after update 10: a plain run, one of another seed, and one that
    was trained on known concepts."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text").mkdir()
    job = tiny_job(tiny_folder("llama"), write_text(folder / "text"), folder / "run")
    world = SyntheticConfig(concepts=40, dim=24, l0=3, pool=256)
    jobs = {
        "run": job,
        "other": replace(job, config=replace(job.config, seed=1)),
        "concepts": replace(
            job,
            config=replace(
                job.config,
                data=world,
                layer=replace(job.config.layer, index=0),
                llm=load.LLMConfig(name="none", dtype=load.Dtype.float32, device="cpu"),
            ),
        ),
    }
    for name, tiny in jobs.items():
        kill(replace(tiny, folder=folder / name))
    return folder


def kill(job):
    def power_cut():
        raise SystemError("power cut")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemError):
        interrupt(patch, STEP + 2, power_cut)
        passes.train_jobs([job])


@pytest.fixture
def harmed(killed, tmp_path):
    """harmed(name) -> a copy of that run's folder, to be damaged."""

    def copy(name: str = "run") -> Path:
        return shutil.copytree(killed / name, tmp_path / name)

    return copy


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of all files in a folder."""
    return {
        str(file): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def check(folder: Path) -> int:
    """Updates that a run has done, according to the checks of a resume."""
    job = read_job(folder)
    job.resumed = True
    return checks.check_jobs([checks.resolve_auto(job)])[0].steps_done


def refused(folder: Path) -> str:
    """The line that refuses to resume a run, once it is sure that no file was changed."""
    before = files(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(
            "sae_lightning.stream.text_source.load_llm", lambda *_: pytest.fail("loads an LLM")
        )
        resume(read_job(folder))
    assert files(folder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(file: Path, change) -> None:
    """Apply `change` to a file's content and save it, with good checksums."""
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


CKPT, STREAM = "checkpoints/last.ckpt", f"checkpoints/stream-{STEP}.pt"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "other", "concepts"])
def test_a_good_checkpoint_says_how_far_the_run_came(killed, name):
    assert check(killed / name) == STEP


@pytest.mark.slow
@pytest.mark.parametrize("part", [CKPT, STREAM])
@pytest.mark.parametrize("seed", range(2))
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(killed, tmp_path, part, seed):
    folder = shutil.copytree(killed / "run", tmp_path / "run")
    job = replace(read_job(folder), resumed=True)
    job = checks.resolve_auto(job)
    llm = job.config.data_source.read_shape()
    sites = job.config.layer.resolve_sites(llm.layers)
    good, rng = (folder / part).read_bytes(), random.Random(seed)
    content, noticed = leaves(torch.load(folder / part)), 0
    for _ in range(25):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (folder / part).unlink()
        (folder / part).write_bytes(bad)
        try:
            checks._read_steps_done(job, sites, llm, set())
        except UserError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:  # a byte between the parts
            assert leaves(torch.load(folder / part)) == content
    assert noticed > 15


@pytest.mark.slow
@pytest.mark.parametrize("part", [CKPT, STREAM])
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a checkpoint"),
        lambda path: torch.save([3], path),
        lambda path: torch.save({"global_step": 7, "settings": {}, "rows": 3}, path),
        lambda path: torch.save(Path, path),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(harmed, part, harm):
    folder = harmed()
    harm(folder / part)
    line = refused(folder)
    message = "is truncated or not a checkpoint (" if part == CKPT else "is damaged, or not the one"
    assert line.startswith(f"{folder / part} {message}") or "does not fit config.yaml" in line
    assert "load" not in line.removeprefix(str(folder / part)), "torch's advice"


def test_the_stream_of_another_run_is_refused(harmed):
    folder, other = harmed(), harmed("other")
    shutil.copy(other / STREAM, folder / STREAM)
    assert "its checksum is not the one in last.ckpt" in refused(folder)


def test_a_checkpoint_without_its_stream_is_no_checkpoint(harmed):
    folder = harmed()
    (folder / STREAM).unlink()
    assert refused(folder).startswith(f"{folder / STREAM}, which belongs to last.ckpt, is gone; ")


@pytest.mark.parametrize(
    "put", [Path.mkdir, lambda path: path.symlink_to("/no/such/disk/last.ckpt")]
)
def test_a_checkpoint_that_is_there_and_cannot_be_opened_is_not_begun_again(harmed, put):
    folder = harmed()
    (folder / CKPT).unlink()
    put(folder / CKPT)
    assert refused(folder).startswith(f"{folder / CKPT} cannot be read: ")


def test_a_checkpoint_of_other_settings_names_one_and_counts_them(harmed):
    folder = harmed()
    rewrite(folder / CKPT, lambda saved: saved["settings"].update({"loss.l1": 0.5}))
    message = "does not fit config.yaml: it was made with loss.l1=0.5, not 0.01"
    assert refused(folder).endswith(message)
    rewrite(folder / CKPT, lambda saved: saved["settings"].update({"seed": 3}))
    assert refused(folder).endswith(f"{message} (2 settings differ)")


def at(path, value):
    """Make change(content), which sets the value at a path of keys."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value(content[path[-1]])

    return change


ADAM = ("optimizer_states", 0, "state")
FIT = ("loops", "fit_loop")
LOOP = (*FIT, "epoch_loop.manual_optimization.optim_step_progress", "total")
GOOD = {
    CKPT: {
        "Adam lacks 0": at(ADAM, lambda _: {}),
        "Adam.1 lacks exp_avg": at((*ADAM, 1), lambda state: {"step": state["step"]}),
        "Adam.0.exp_avg_sq is float32 [48, 24]": at((*ADAM, 0, "exp_avg_sq"), lambda x: x.T),
        "Adam.2.step is 3.0 and should be 10.0": at(
            (*ADAM, 2, "step"), lambda _: torch.tensor(3.0)
        ),
        "Adam.0.exp_avg.is_contiguous() is True": at(
            (*ADAM, 0, "exp_avg"), lambda x: x.contiguous()
        ),
        "Adam.0.exp_avg is not finite": at((*ADAM, 0, "exp_avg"), lambda x: x / 0),
        "weights.heads.0.sae.W_enc is float64": at(
            ("state_dict", "heads.0.sae.W_enc"), lambda x: x.double()
        ),
        "weights.heads.0.sae.b_enc is float32 [49]": at(
            ("state_dict", "heads.0.sae.b_enc"), lambda x: torch.zeros(49)
        ),
        "heads.0.sae.b_dec is not finite": at(
            ("state_dict", "heads.0.sae.b_dec"), lambda x: x.fill_(torch.nan)
        ),
        "weights lacks heads.0.": at(
            ("state_dict",), lambda x: {k: v for k, v in x.items() if "in_mean" not in k}
        ),
        "heads.1.more does not belong to this SAE": at(
            ("state_dict",), lambda x: x | {"heads.1.more": torch.ones(1)}
        ),
        "checkpoint.global_step is 1000000 and should be 1 to 40": at(
            ("global_step",), lambda _: 1_000_000
        ),
        "epoch_progress is 5 and should be dict": at((*FIT, "epoch_progress"), lambda _: 5),
        "batch_progress lacks is_last_batch": at(
            (*FIT, "epoch_loop.batch_progress"), lambda x: x.popitem() and x
        ),
        "optim_progress is 5": at(
            (*FIT, "epoch_loop.automatic_optimization.optim_progress"), lambda _: 5
        ),
        "Invalid version": at(("pytorch-lightning_version",), lambda _: "garbage"),
        "Lightning's version is 1": at(("pytorch-lightning_version",), lambda _: "1.9.0"),
        "training_metrics.train/dead is NoneType": at(
            ("state_dict", "heads.0._extra_state", "training_metrics", "train/dead"),
            lambda _: None,
        ),
        "completed is 9 and should be 10": at((*LOOP, "completed"), lambda n: n - 1),
    },
    STREAM: {
        "stream.served is 41 and should be 10": at(("served",), lambda _: STEPS + 1),
        "rows.read is 16 and should be 0 to 15": at(("rows", "read"), lambda n: n + 1),
        "rows.llm_batches is -1": at(("rows", "llm_batches"), lambda _: -1),
        "the text's position is 61 and should be 60": at(
            ("rows", "tokens", "cursor"), lambda n: n + 1
        ),
        "tokens.epoch is 0": at(("rows", "tokens", "epoch"), lambda _: 0),
        "pool.ids is int32": at(("pool", "ids"), lambda x: x.int()),
        "pool.ids holds -1 to": at(("pool", "ids"), lambda x: x.index_fill(0, x[:1] * 0, -1)),
        "pool.rows.resid.1 is float64": at(("pool", "rows", "resid.1"), lambda x: x.double()),
        "pool.rows.resid.1 is float32 [3, 24]": at(("pool", "rows", "resid.1"), lambda x: x[:3]),
        "pool.rows lacks resid.1": at(("pool", "rows"), lambda x: {"resid.2": x["resid.1"]}),
        "rows in the pool is": at(("pool", "ids"), lambda x: x.repeat(9)),
        "PCG64": at(("pool", "random", "bit_generator"), lambda _: "MT19937"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "message"), [(part, message) for part, harms in GOOD.items() for message in harms]
)
def test_what_does_not_fit_is_named_though_its_checksums_are_good(harmed, part, message):
    folder = harmed()
    # as in a checkpoint of 0.1.0: its shape is all by which a stream is known
    rewrite(folder / CKPT, lambda saved: saved.pop("stream"))
    rewrite(folder / part, GOOD[part][message])
    line = refused(folder)
    assert message in line
    assert line.endswith(f"; delete {folder / CKPT} to start the run again from its beginning")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "concepts"])
def test_a_checkpoint_from_before_there_were_checksums_is_resumed_the_same(harmed, tmp_path, name):
    folder = harmed(name)
    whole = shutil.copytree(folder, tmp_path / "whole")
    rewrite(folder / CKPT, lambda saved: saved.pop("stream"))
    for run in (folder, whole):
        resume(read_job(run))
    assert_same(folder, whole)


def test_a_disk_that_does_not_answer_is_no_reason_to_delete_a_checkpoint(harmed, monkeypatch):
    folder = harmed()

    def stale(*_, **__):
        raise OSError(116, "Stale file handle", str(folder / CKPT))

    monkeypatch.setattr("sae_lightning.formats.pickles.ZipFile", stale)
    assert refused(folder) == f"{folder / CKPT} cannot be read: Stale file handle"


@pytest.mark.slow
def test_a_text_that_changed_to_as_many_tokens_is_not_trained_on(killed, harmed):
    folder, text = harmed(), killed / "text" / "a.txt"
    good = text.read_text()
    first, second, *words = good.split(" ")
    try:
        text.write_text(" ".join([first, *words, second]))
        before = {name: it for name, it in files(folder).items() if "/sae/" in name or CKPT in name}
        with pytest.raises(UserError, match=r"^data: the text is no longer the one that the run"):
            resume(read_job(folder))
    finally:
        text.write_text(good)
    assert before.items() <= files(folder).items()
    assert not (folder / "metrics.json").exists()
