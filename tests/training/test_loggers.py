"""Loggers beside TensorBoard: what they store, read back from their own files."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import run_script
from logged import read_csv, read_mlflow, read_wandb
from test_run import curves, interrupt, weights
from tiny_run import WORLD_BATCH as BATCH
from tiny_run import synthetic_job

from sae_lightning.errors import UserError
from sae_lightning.runs import passes
from sae_lightning.runs.jobs import read_job
from sae_lightning.runs.logger_choice import check_loggers
from sae_lightning.training import remote_loggers
from sae_lightning.training.logger_settings import (
    CSVConfig,
    LoggerConfig,
    MLflowConfig,
    WandbConfig,
)
from sae_lightning.training.loggers import CSVCurves
from sae_lightning.training.settings import OptimConfig

CSV = LoggerConfig(csv=CSVConfig(use=True))
WANDB = LoggerConfig(wandb=WandbConfig(use=True, project="p", tags=["a", "b"], offline=True))
LAST = 60 * BATCH


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own: no login, no telemetry, no cache of the user's."""
    for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mlflow(home):
    """MLflow, in its default database: the file mlflow.db in the working folder."""
    return LoggerConfig(mlflow=MLflowConfig(use=True, experiment="e")).resolve()


def read_environment() -> dict[str, str]:
    """The variables of `home`, for a process that is a fork."""
    return {k: v for k, v in os.environ.items() if k == "HOME" or k.startswith("WANDB_")}


def sweep(folder: Path, logger: LoggerConfig) -> list:
    """Two jobs of a sweep, of which the second diverges at once."""
    (folder / "sweeps").mkdir(parents=True)
    (folder / "sweeps" / "multirun.yaml").touch()  # as Hydra does
    changes = ({}, {"optim": OptimConfig(lr=1e30)})
    return [
        replace(
            synthetic_job(folder / "sweeps" / name, logger=logger, **change),
            sweep_folder=folder / "sweeps",
            multirun=True,
        )
        for name, change in zip(("good", "bad"), changes, strict=True)
    ]


def in_tensorboard(folder: Path) -> dict:
    """TensorBoard's curves but the group that repeats some, rounded as it stores them."""
    return {k: v for k, v in curves(folder).items() if not k.startswith("At a glance/")}


def rounded(stored: dict) -> dict:
    return {
        tag: [(step, float(np.float32(value))) for step, value in sorted(set(points))]
        for tag, points in stored.items()
        if not tag.startswith("speed/")
    }


def stop(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


def resume(jobs: list, logger: LoggerConfig) -> None:
    read = [read_job(job.folder) for job in jobs]
    for job in read:
        job.config.logger = logger
    passes.train_jobs([replace(job, resumed=True, multirun=True) for job in read])


def cut_power() -> None:
    raise ZeroDivisionError("power cut")


@pytest.mark.slow
def test_the_table_holds_tensorboards_curves_and_a_resumed_run_replaces_later_rows(
    tmp_path, monkeypatch
):
    """Killed at update 30, the run goes on from its checkpoint at update 20."""
    job, plain = (synthetic_job(tmp_path / name, logger=CSV) for name in ("a", "b"))
    plain = replace(plain, config=replace(plain.config, logger=LoggerConfig()))
    passes.train_jobs([plain])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        interrupt(patch, 30, cut_power)
        passes.train_jobs([job])
    assert max(step for step, _ in read_csv(job.folder)["train/loss"]) == 24 * BATCH
    resume([job], CSV)
    stored = read_csv(job.folder)
    assert rounded(stored) == in_tensorboard(job.folder) == in_tensorboard(plain.folder)
    steps = [step for step, _ in stored["train/l0"]]
    assert steps == [BATCH * n for n in (*range(8, 60, 8), 60)]
    assert weights(job.folder) == weights(plain.folder), "a logger changes nothing about training"
    assert not (plain.folder / "csv").exists()
    assert "logger" not in (job.folder / "sae" / "cfg.json").read_text()


def test_a_run_that_is_scored_has_ended_even_if_its_sweep_is_stopped(tmp_path, monkeypatch):
    """Asked to stop in its last update, the sweep starts no other pass; this one is whole."""
    good, bad = sweep(tmp_path, CSV)
    outcomes = []
    monkeypatch.setattr(CSVCurves, "finish", lambda _, outcome: outcomes.append(outcome))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 60, stop(signal.SIGTERM))
        passes.train_jobs([good, bad])
    assert (good.folder / "metrics.json").is_file()
    assert outcomes == ["success", "failed"]


@pytest.mark.slow
def test_a_planted_link_is_not_written_through(tmp_path, monkeypatch):
    job = synthetic_job(tmp_path / "a", logger=CSV)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        interrupt(patch, 30, cut_power)
        passes.train_jobs([job])
    table, victim = job.folder / "csv" / "metrics.csv", tmp_path / "victim"
    victim.write_text("step,x\n1,2\n")
    table.unlink()
    table.symlink_to(victim)
    resume([job], CSV)
    assert victim.read_text() == "step,x\n1,2\n" and not table.is_symlink()


@pytest.mark.slow
def test_weights_and_biases_shows_what_tensorboard_shows(tmp_path, monkeypatch, capfd):
    """A sweep, stopped by Ctrl-C and resumed: each head is one run, in two parts."""
    good, bad = sweep(tmp_path, WANDB)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 23, stop(signal.SIGINT))
        passes.train_jobs([good, bad])
    resume([good, bad], WANDB)
    first, second = read_wandb(good.folder)
    both = {k: first.curves.get(k, []) + v for k, v in second.curves.items()}
    assert rounded(both) == in_tensorboard(good.folder)
    assert all(len(v) == len(set(v)) for v in both.values()), "no point twice"
    assert first.histograms == second.histograms == {"held_out/log10_density", "decoder/norm"}
    (failed,) = read_wandb(bad.folder)
    assert [part.outcome for part in (first, second, failed)] == ["0", "0", "1"]
    assert {(part.name, part.group) for part in (first, second)} == {("good", "sweeps")}
    assert (failed.name, failed.group) == ("bad", "sweeps")
    assert first.settings["model.features"] == 48 and failed.settings["optim.lr"] == 1e30
    assert not [name for name in first.settings if name.startswith("logger")]
    assert "logger=wandb" not in capfd.readouterr().err


@pytest.mark.slow
def test_mlflow_shows_what_tensorboard_shows(tmp_path, monkeypatch, mlflow, capfd):
    """A sweep that is killed and resumed: no point is there twice."""
    good, bad = sweep(tmp_path, mlflow)
    uri = mlflow.mlflow.tracking_uri
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    with monkeypatch.context() as patch:
        interrupt(patch, 30, cut_power)
        passes.train_jobs([good, bad])
    stored = read_mlflow(uri, good.folder)
    assert stored.outcome == "FAILED" and max(stored.curves["train/loss"])[0] == 24 * BATCH
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, 33, stop(signal.SIGTERM))
        resume([good, bad], mlflow)
    assert read_mlflow(uri, good.folder).outcome == "KILLED"
    resume([good, bad], mlflow)
    stored, failed = (read_mlflow(uri, job.folder) for job in (good, bad))
    assert rounded(stored.curves) == in_tensorboard(good.folder)
    assert all(len(v) == len(dict(v)) for k, v in stored.curves.items()), "no point twice"
    assert (stored.name, stored.group, stored.outcome) == ("good", "sweeps", "FINISHED")
    assert (failed.name, failed.group, failed.outcome) == ("bad", "sweeps", "FAILED")
    assert stored.settings["model.features"] == "48" and failed.settings["optim.lr"] == "1e+30"
    assert "logger=mlflow" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_server_that_fails_ends_its_logger_with_one_line_and_nothing_else(
    tmp_path, monkeypatch, mlflow, capfd
):
    good, bad = sweep(tmp_path, mlflow)
    send, count = remote_loggers.MLflowCurves._send, iter(range(100))

    def lose_connection(self, values, tokens):
        if next(count) == 3:
            raise ConnectionError("no route to http://me:secret@host")
        send(self, values, tokens)

    monkeypatch.setattr(remote_loggers.MLflowCurves, "_send", lose_connection)
    (metrics, _) = passes.train_jobs([good, bad])
    said = capfd.readouterr().err
    assert said.count("logger=mlflow: no route to http://host; TensorBoard's curves of good") == 1
    assert max(in_tensorboard(good.folder)["train/loss"])[0] == LAST and metrics["l0"] > 0
    lost = replace(mlflow.mlflow, tracking_uri="http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    jobs = sweep(tmp_path / "again", LoggerConfig(mlflow=lost))
    assert passes.train_jobs(jobs)[0] == metrics
    assert capfd.readouterr().err.count("logger=mlflow: ") == 1, "one line for all heads"


@pytest.mark.slow
def test_without_a_login_nothing_starts(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked in a batch job"))
    online = LoggerConfig(wandb=WandbConfig(use=True, project="p"))
    with pytest.raises(UserError, match="logger=wandb: no login found; run `wandb login`, set"):
        check_loggers(online)


@pytest.mark.slow
def test_without_a_network_the_curves_stay_on_disk(home):
    """In a process of its own, because Weights & Biases reads its settings once."""
    typed = ["logger=wandb", "data=synthetic", "trainer=smoke", "trainer.tokens=1024"]
    typed += ["data.pool=512", "model.features=64", "hydra.run.dir=run"]
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    given = read_environment() | nowhere | {"WANDB_API_KEY": "a" * 40}
    done = run_script("train.py", *typed, cwd=home, **given)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("logger=wandb: ") == 1 and "kept on disk: wandb sync" in done.stderr
    (part,) = read_wandb(home / "run")
    shown, drawn = rounded(part.curves), in_tensorboard(home / "run")
    # NaN where no concept is recovered, which equals nothing
    assert sorted(map(repr, shown.items())) == sorted(map(repr, drawn.items()))
    assert part.outcome == "0"


ONLINE = """
import os, time
from pathlib import Path
from wandb_server import WandbServer
from sae_lightning.runs.logger_choice import check_loggers
from sae_lightning.training import loggers, remote_loggers
from sae_lightning.training.logger_settings import LoggerConfig, WandbConfig
from sae_lightning.training.logging import LoggedRun

server = WandbServer()
os.environ |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
config = LoggerConfig(wandb=WandbConfig(use=True, project="p", tags=["t"]))
check_loggers(config)

def train(resumed_at, tokens, outcome):
    starts = len(server.started)
    about = LoggedRun(Path(), "name", "sweep", {"model.k": 3}, resumed_at)
    (log,) = loggers.open_loggers(config, about, set())
    for n in tokens:
        log.add_scalars({"train/loss": 1 / n}, n)
    while len(server.started) == starts or not log.sent:
        time.sleep(0.1)
    server.gone = resumed_at == 400
    loggers.finish_loggers([(log, outcome)])

train(None, (100, 200, 300), "success")
train(200, (300, 400), "failed")  # killed at 300, resumed at 200
first, *_, last = [said for said in server.started if said["groupName"]]
assert first["name"] == last["name"], "one run"
for said in (first, last):
    assert (said["displayName"], said["groupName"], said["tags"]) == ("name", "sweep", ["t"])
sent = "".join(said["config"] or "" for said in server.started)
assert '"model.k":{"value":3}' in sent, sent
points = [(row["tokens"], row["_step"], row["train/loss"]) for row in server.history]
assert points == [(n, n, 1 / n) for n in (100, 200, 300, 400)], points
assert server.exit_codes == [0, 1]
remote_loggers.ANSWER_SECONDS = loggers.ANSWER_SECONDS = 10
train(400, (500,), "success")
"""


@pytest.mark.slow
def test_online_a_resumed_run_goes_on_where_it_was_and_a_lost_server_costs_only_its_curves(home):
    (home / "online.py").write_text(ONLINE)
    done = run_script(str(home / "online.py"), cwd=home, **read_environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("logger=wandb: ") == 1
    assert "Timed out finishing run.; TensorBoard's curves of name are complete" in done.stderr
    assert re.search(r"to upload the rest: wandb sync wandb/run-\d+_\d+-[\w-]+\n", done.stderr)
