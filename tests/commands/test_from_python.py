"""`train` and `train_sweep` do in Python what the command does, and leave the program as it was."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import sae_lightning
from sae_lightning import UserError, train, train_sweep
from sae_lightning.files import make_jsonable
from sae_lightning.runs import passes
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.jobs import make_job, read_job
from sae_lightning.runs.schemas import register_schemas

SMALL = (
    *("data=synthetic", "data.concepts=32", "data.dim=16", "data.l0=3", "data.pool=256"),
    *("trainer=smoke", "trainer.tokens=512", "trainer.batch=64", "trainer.accelerator=cpu"),
    *("trainer.checkpoint_every=512", "eval.every=512", "eval.tokens=128", "model.features=48"),
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that Python has trained."""
    folder = tmp_path_factory.mktemp("python") / "my run (k=4)"
    return train(*SMALL, "model=topk", "model.k=4", f"hydra.run.dir={folder}")


@pytest.mark.slow
def test_the_config_is_that_of_the_command_line(trained):
    register_schemas()
    typed = [*SMALL, "model=topk", "model.k=4"]
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        expected = make_job(compose("config", typed), trained.folder, typed)
    saved = read_job(trained.folder)
    automatic = ("precision", "accelerator", "threads", "products", "dtype", "device", "attn")
    expected, found = expected.config.to_flat_dict(), saved.config.to_flat_dict()
    different = {name for name in found if found[name] != expected[name]}
    assert {name.split(".")[1] for name in different} <= {*automatic}, "resolved for this machine"
    assert saved.overrides == [*typed, f"hydra.run.dir={trained.folder}"][:-1]


def test_a_run_has_its_folder_its_metrics_and_its_sae(trained):
    saved = json.loads((trained.folder / "metrics.json").read_text())["held_out"]
    assert make_jsonable(trained.metrics) == saved
    assert trained.metrics["l0"] <= 4
    assert trained.sae is trained.sae, "loaded once"
    assert trained.sae(torch.zeros(2, 16)).features.shape == (2, 48)


@pytest.mark.slow
def test_a_second_run_in_the_same_process_is_trained_and_resumed(trained, tmp_path):
    again = train(*SMALL, "model=topk", "model.k=4", f"hydra.run.dir={tmp_path / 'again'}")
    assert torch.equal(again.sae.W_dec, trained.sae.W_dec)
    assert train(f"resume={again.folder}").folder == again.folder


@pytest.mark.slow
def test_a_sweep_gives_its_runs_in_the_order_that_was_typed(tmp_path):
    runs = train_sweep(*SMALL, "model=topk", "model.k=4,2,3", "hydra.sweep.dir=sweep")
    assert [run.folder for run in runs] == [tmp_path / "sweep" / f"model.k={k}" for k in (4, 2, 3)]
    assert [run.sae.config.k for run in runs] == [4, 2, 3]
    assert train_sweep("resume=sweep")[0].folder.parent == tmp_path / "sweep"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("layer=9", r"layer=9: `layer` chooses a preset .* write layer\.index=9"),
        ("model.k=3", r"model\.k has no meaning for this model, only for model=topk, .*"),
        ("seed=-1", r"seed=-1: give 0 or a positive integer below 2\*\*63"),
        ("resume=nope", r"nope holds no run .*"),
        ("d_sae=64", r"d_sae=64: no such setting here; use model\.features=\.\.\."),
        ("layer.index=1", r"layer\.index=1 has no meaning with data=synthetic.*"),
        ("loss.l1=1,2", r"loss\.l1=1,2: several values make a sweep, which needs -m; .*"),
        ("-m", r"-m: only settings .* a sweep is train_sweep\(\.\.\.\), .*"),
        ("hydra/launcher=basic", r"hydra/launcher=basic: only the command takes this, .*"),
    ],
)
def test_what_the_command_answers_in_a_line_is_a_user_error(typed, line, tmp_path):
    given = ["data=synthetic"] if typed.startswith(("layer.", "seed")) else []
    with pytest.raises(UserError, match=f"^{line}$"):
        train(*given, typed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_error_in_a_sweep_is_a_user_error_too():
    with pytest.raises(UserError, match=r"^model\.features=-1: give at least 1 feature$"):
        train_sweep(*SMALL[:-1], "model.features=4,-1")


def test_the_programs_own_use_of_hydra_goes_on(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        with pytest.raises(UserError):
            train("layer=9")
        assert compose("mine").a == 1
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.slow
def test_presets_of_a_folder_are_found(tmp_path):
    (tmp_path / "presets" / "model").mkdir(parents=True)
    (tmp_path / "presets" / "model" / "mine.yaml").write_text("defaults: [topk, _self_]\nk: 5\n")
    run = train(*SMALL, "model=mine", config_dir="presets")
    assert run.sae.config.k == 5
    with pytest.raises(UserError, match="^config_dir=nope: no such folder$"):
        train(*SMALL, config_dir="nope")


@pytest.mark.slow
def test_a_run_in_a_thread_installs_no_signal_handlers():
    """As in a server, or in a notebook whose cells run in threads."""
    runs, before = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: runs.append(train(*SMALL)))
    thread.start()
    thread.join()
    assert runs[0].metrics["l0"] > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_a_keyboard_interrupt(monkeypatch):
    def stop(jobs):
        raise SystemExit(130)

    monkeypatch.setattr(passes, "train_jobs", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*SMALL)


def test_a_rank_of_a_launcher_is_told_to_use_the_command(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", os.environ | place | address)
    with pytest.raises(UserError, match=r"^train\(\) starts the processes .* itself: .*"):
        train(*SMALL)


def test_the_version_is_that_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf8")
    assert f'version = "{sae_lightning.__version__}"' in project
