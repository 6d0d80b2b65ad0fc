"""Loggers on the command line: what is refused before anything starts, and what resuming keeps."""

import sys
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from tiny_run import synthetic_job

from sae_lightning.errors import UserError
from sae_lightning.runs import logger_choice
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.jobs import CONFIG_FILE, format_config, format_resume_command, make_job
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.training.logger_settings import LoggerConfig, MLflowConfig, WandbConfig

TEAM = LoggerConfig(wandb=WandbConfig(use=True, project="p", entity="team"))
SERVER = LoggerConfig(mlflow=MLflowConfig(use=True, experiment="e", tracking_uri="http://host"))


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """choose("logger=csv", ...) -> the job of a command line."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    login = SimpleNamespace(__spec__=True, setup=dict, Settings=dict, login=lambda **_: True)
    monkeypatch.setitem(sys.modules, "wandb", login)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(ConfigStore.instance().repo))
    register_schemas()

    def make(*overrides):
        return make_job(compose("config", [*overrides]), tmp_path / "new", [*overrides])

    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        yield make


@pytest.fixture
def saved(tmp_path):
    """saved(loggers) -> `resume=...` of a run that used them."""

    def write(loggers):
        job = synthetic_job(tmp_path / "old", logger=loggers)
        job.folder.mkdir()
        (job.folder / CONFIG_FILE).write_text(format_config(job))
        return f"resume={job.folder}"

    return write


@pytest.mark.slow
def test_one_logger_or_several_are_chosen_by_name(choose):
    assert choose().config.logger.used == choose("logger=none").config.logger.used == []
    assert choose("logger=csv").config.logger.used == ["csv"]
    job = choose("logger=[mlflow,csv,wandb]", "logger.wandb.tags=[a,b]")
    assert job.config.logger.used == ["wandb", "csv", "mlflow"]
    assert job.config.logger.wandb.tags == ["a", "b"]


@pytest.mark.slow
def test_what_the_environment_says_is_saved_but_for_an_address_that_may_hold_a_password(
    choose, monkeypatch, tmp_path
):
    logger = choose("logger=[mlflow,wandb]").config.logger
    assert (logger.wandb.project, logger.mlflow.experiment) == ("sae_lightning",) * 2
    assert logger.mlflow.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "saes")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    logger = choose("logger=[mlflow,wandb]").config.logger
    assert (logger.wandb.project, logger.mlflow.experiment) == ("mine", "saes")
    assert logger.mlflow.tracking_uri is None
    assert choose("logger=wandb", "logger.wandb.project=x").config.logger.wandb.project == "x"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["logger.wandb.project=x"], "logger.wandb.project=x: has no effect without logger=wandb"),
        (["logger=csv", "logger.mlflow.experiment=x"], ".*has no effect without logger=mlflow"),
        (["logger=wandb", "logger.wandb.project=a/b"], "logger.wandb.project=a/b: give a name"),
        *(
            (
                ["logger=mlflow", f"logger.mlflow.tracking_uri='{uri}'"],
                "logger.mlflow.tracking_uri: holds a password, .* MLFLOW_TRACKING_URI",
            )
            for uri in (
                "http://me:secret@host",
                "mysql://me:the/secret@host",
                "postgresql://host/runs?user=me&password=secret",
            )
        ),
    ],
)
def test_options_that_cannot_work_are_refused(choose, typed, line):
    with pytest.raises(UserError, match=line) as error:
        choose(*typed)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("package", ["wandb", "mlflow", "sqlalchemy"])
def test_a_missing_package_is_one_line_that_says_what_to_install(choose, monkeypatch, package):
    missing = [package].__contains__
    monkeypatch.setattr(logger_choice, "find_spec", lambda name: None if missing(name) else name)
    kind = "wandb" if package == "wandb" else "mlflow"
    with pytest.raises(UserError, match=rf"logger={kind}: .* {package} .*pip .*\.\[{kind}\]"):
        choose(f"logger={kind}")


@pytest.mark.slow
def test_a_missing_login_is_told_when_the_command_is_read(choose, saved, monkeypatch):
    old = saved(LoggerConfig(wandb=WandbConfig(use=True, project="p")))
    monkeypatch.setattr(sys.modules["wandb"], "login", lambda **_: False)
    for typed in (["logger=wandb"], [old]):
        with pytest.raises(UserError, match="logger=wandb: no login found; run `wandb login`, set"):
            choose(*typed)
    assert choose(old, "logger=none").config.logger.used == []
    assert choose("logger=wandb", "logger.wandb.offline=true").config.logger.used == ["wandb"]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_loggers_unless_others_are_typed(choose, saved):
    old = saved(LoggerConfig(wandb=WandbConfig(use=True, project="p", tags=["a"], offline=True)))
    assert choose(old).config.logger.used == ["wandb"]
    assert choose(old, "logger=none").config.logger.used == []
    changed = choose(old, "logger=[csv,wandb]", "logger.wandb.tags=[b]").config.logger
    assert (changed.used, changed.wandb.project) == (["wandb", "csv"], "p")
    assert (changed.wandb.tags, changed.wandb.offline) == (["b"], True)
    added = choose(old, "logger=mlflow").config
    assert added.logger.used == ["mlflow"] and added.logger.mlflow.tracking_uri
    with pytest.raises(UserError, match="has no effect without logger=mlflow"):
        choose(old, "logger.mlflow.experiment=x")
    with pytest.raises(UserError, match="loss.l1=1 cannot be given with it"):
        choose(old, "logger=csv", "loss.l1=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loggers", "destination"),
    [(TEAM, "logger.wandb.entity=team"), (SERVER, "logger.mlflow.tracking_uri=http://host")],
)
def test_a_folder_does_not_decide_where_curves_are_sent(choose, saved, loggers, destination):
    """It may be a stranger's, who would be told what is trained here, and how it is going."""
    old = saved(loggers)
    with pytest.raises(UserError, match=f"{destination} says where curves are sent; allow it by"):
        choose(old)
    assert choose(old, "logger=none").config.logger.used == []
    job = choose(old, destination)
    assert job.config.logger == loggers
    assert format_resume_command([job]).endswith(f"resume=old {destination}")


@pytest.mark.slow
def test_loggers_share_a_pass_and_are_free_on_resuming(choose):
    plain, logged = choose().config, choose("logger=csv").config
    assert plain.stream_key() == logged.stream_key()
    assert plain.list_fixed_settings() == logged.list_fixed_settings()
    assert plain.describe_settings() == logged.describe_settings()
