"""Bad input gets one clear line that names the setting and the remedy."""

import errno
import os
import re
import sys
from pathlib import Path

import pytest
from few_quick import mark_most_slow
from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny_run import packaged_job
from yaml import MarkedYAMLError

from sae_lightning.errors import UserError
from sae_lightning.runs import cli, folders, sweep
from sae_lightning.runs.cli import (
    explain_error,
    refuse_other_ranks,
    report_errors,
    rewrite_command_line,
)
from sae_lightning.runs.jobs import CONFIG_FILE, make_job
from sae_lightning.runs.translations import TRANSLATIONS
from sae_lightning.sae import ARCHITECTURES

# What is typed, and the line that answers it (a regular expression for the whole line).
BAD = {
    # a value for a group
    "layer=9": r"layer=9: `layer` chooses a preset \(attn, mlp, resid, transcoder\); "
    r"for a value write layer\.index=9",
    "model=10000": r"model=10000: `model` chooses .*; for a value write model\.features=10000",
    "loss=0.01": r"loss=0\.01: `loss` chooses .*; for a value write loss\.l1=0\.01",
    "model=jumprelu loss=0.01": r".* for a value write loss\.l0=0\.01",
    "model=topk loss=0.01": r"loss=0\.01: `loss` chooses a preset \([^)]*topk[^)]*\)",
    "trainer=1000": r"trainer=1000: `trainer` chooses a preset \([^)]*cpu[^)]*\)",
    # typos
    "hydra/launcher=ray": r"hydra/launcher=ray: not installed; pip install -e \"\.\[ray\]\", in .*",
    "hydra/sweeper=optuna hydra/sweeper/sampler=nope": r"hydra/sweeper/sampler=nope: not .*",
    "hydra/sweeper=nope": r"hydra/sweeper=nope: not installed, or misspelt",
    "llm=gpt3": r"llm=gpt3: no such preset; did you mean gpt2\? choose from .*smollm2.*",
    "data=shakespear": r"data=shakespear: no such preset; did you mean shakespeare\? .*",
    "experiment=nope": r"experiment=nope: no such preset; .*",
    "trainr=cpu": r"no setting trainr: did you mean trainer\? there are llm, data, .*",
    "model.featurs=3": r"no setting model\.featurs: did you mean features\? there are model\.name, "
    r".*model\.features.*",
    "callbacks.resample.evry=3": r"no setting callbacks\.resample\.evry: did you mean every\? .*",
    "+model.featurs=3": r".*'featurs': leave out the \+, or correct the setting's name",
    "+loss.l1=1e-3": r"\+loss\.l1=1e-3: this setting exists; leave out the \+",
    "nothing.of.this=1": r"no setting nothing: there are llm, .*",
    # other tools' words, wherever they are put
    "max_steps=100": r"max_steps=100: no such setting here; use trainer\.tokens=.*",
    "trainer.max_steps=100": r"trainer\.max_steps=100: .* use trainer\.tokens=.*",
    "+trainer.max_steps=100": r"max_steps: no such setting here; use trainer\.tokens=.*",
    "trainer.fast_dev_run=true": r"trainer\.fast_dev_run=true: .* use trainer=smoke, .*",
    "ckpt_path=x": r"ckpt_path=x: no such setting here; use resume=<run folder>",
    "sae.d_sae=512": r"sae\.d_sae=512: no such setting here; use model\.features=\.\.\.",
    "model.expansion_factor=8": r"model\.expansion_factor=8: .* the factor times the LLM's width",
    "data.context_size=64": r"data\.context_size=64: .* use data\.context=\.\.\.",
    "llm.load_in_4bit=true": r"llm\.load_in_4bit=true: .* use llm\.load\.quantization_config=.*",
    "llm.device_map=auto": r"llm\.device_map=auto: .* use llm\.load\.device_map=\.\.\.",
    "trainer.devices=[0,1]": r"trainer\.devices=\[0, 1\]: .* CUDA_VISIBLE_DEVICES=0,1 .*",
    "trainer.devices=0": r"trainer\.devices=0: give a number of devices, or auto; .*",
    "lr=1e-3": r"lr=1e-3: no such setting here; use optim\.lr=\.\.\.",
    "loss.l1_coefficient=1 loss.l1=2": r"loss\.l1_coefficient=1: .* use loss\.l1=\.\.\.",
    "k=32": r"k=32: no such setting here; use model=topk model\.k=\.\.\.",
    "fast_dev_run": r"fast_dev_run: no such setting here; use trainer=smoke, .*",
    # the wrong model
    "model=dense loss.l1=1e-3": r"loss\.l1 has no meaning for this model, only for model=relu and "
    "model=gated: leave it out",
    "loss.auxk=0.1": r"loss\.auxk has no meaning for this model, only for model=topk, "
    "model=batch_topk and model=matryoshka: leave it out",
    "model=topk loss.target_l0=50": r"loss\.target_l0 has no meaning .* only for model=relu, "
    "model=jumprelu and model=gated: leave it out",
    "model=topk loss.preact=1": r"loss\.preact has no meaning .* only for model=relu, "
    "model=jumprelu and model=gated: leave it out",
    "model=relu model.k=3": r"model\.k has no meaning .* only for model=topk, "
    "model=batch_topk and model=matryoshka: leave it out",
    "model=gated loss.p=0.2": r"loss\.p has no meaning for this model, only for model=relu: .*",
    "model=batch_topk model.threshold=1": r"model\.threshold has no meaning .* model=jumprelu: .*",
    "model=topk model.groups=[0.5]": r"model\.groups has no meaning .* model=matryoshka: .*",
    "model=topk loss.auxkk=1": r"no setting loss\.auxkk: did you mean auxk_k\? there are .*",
    "model=topk model.k=0": r"model\.k=0: give a number from 1 to model\.features=10000",
    "model=matryoshka model.features=10 model.k=3": r"model\.groups=.* give larger shares, or .*",
    "model=jumprelu loss.penalty_kind=l0": r"loss\.penalty_kind=l0: .* one of \[tanh, step\]",
    "loss.l1=0 loss.target_l0=5": r"loss\.l1=0: loss\.target_l0=5\.0 multiplies it, .*",
    "model=dense loss=relu": r"loss: this is not the objective of model\.name=dense but of "
    r"model=relu; choose .*",
    "model.name=topkk": r"model\.name=topkk: no such architecture; choose from relu, dense.*",
    # the wrong data
    "data.path=x.txt": r"data\.path has no meaning for this data, only for data=text and "
    "data=activations: leave it out",
    "data.concepts=5": r"data\.concepts has no meaning .* data=synthetic: .* or add data=synthetic",
    "data=synthetic data.context=5": r"data\.context has no meaning for this data, only for "
    "data=shakespeare, data=hub and data=text: leave it out",
    # interpolations
    r"data=text data.path=a data.column=\${x}": r"data\.column=\$\{x\}: config\.yaml .* hold .*",
    "seed=${nope}": r"seed: Interpolation key 'nope' not found",
    "optim.lr=${oc.env:NO_SUCH_VARIABLE}": r"optim\.lr: .*'NO_SUCH_VARIABLE' not found\"",
    "loss=${nope}": r"Error resolving interpolation '\$\{nope\}', possible .* keys: .*trainer.*",
    "optim.lr=${nope:}": r"optim\.lr: Unsupported interpolation type nope",
    # values
    "loss.l1=abc": r"loss\.l1=abc: value 'abc' .* could not be converted to Float",
    "loss.l1=": r"loss\.l1=: .* could not be converted to Float",
    "loss.l1=-1": r"loss\.l1=-1\.0: give a number that is 0 or more, such as 1e-3",
    "loss.l1=nan": r"loss\.l1=nan: give .*",
    "loss.l1=null": r"loss\.l1=null: null is not possible here",
    "layer.source=foo": r"layer\.source=foo: invalid value 'foo', expected one of "
    r"\[attn, mlp_in, mlp, resid\]",
    "layer.index=-1": r"layer\.index=-1: .*give 0 or more",
    "trainer.accelerator=tpu": r"trainer\.accelerator=tpu: .* one of \[auto, cpu, gpu\]",
    "trainer.tokens=1e6": r"trainer\.tokens=1e6: give a whole number in digits, such as .*",
    "trainer.tokens=-5": r"trainer\.tokens=-5: give a positive number",
    "trainer.tokens=0": r"trainer\.tokens=0: give a positive number",
    "trainer.tokens=100": r"trainer\.tokens=100 is less than one batch: .* trainer\.batch=1024",
    "trainer.batch=100000": r"trainer\.batch=100000 is larger .* \(data\.pool=65536\): .*",
    "model.features=0": r"model\.features=0: give at least 1 feature",
    "model.features=-3": r"model\.features=-3: give at least 1 feature",
    "model.features=1.5": r"model\.features=1\.5: give a whole number .*",
    "data.context=1": r"data\.context=1: .* give 2 or more",
    "data.max_norm=0.5": r"data\.max_norm=0\.5: .* give more than 1 .*",
    "data.held_out=3": r"data\.held_out=3: .*",
    "llm.device=tpu": r"llm\.device=tpu: unknown; choose auto, cpu, .*",
    "llm.batch=0": r"llm\.batch=0: .*give 1 or more",
    "optim.lr=0": r"optim\.lr=0\.0: give a positive learning rate, such as 1e-3",
    "optim.decay=2": r"optim\.decay=2\.0: give a share of the run, from 0 to 1",
    "seed=-1": r"seed=-1: give 0 or a positive integer below 2\*\*63",
    "seed=18446744073709551616": r"seed=18446744073709551616: give 0 or .*",
    "seed=0 model.seed=9223372036854775808": r"model\.seed=9223372036854775808: give 0 or .*",
    "callbacks=3": r"callbacks=3: .*",
    "data=text data.path=[a,b]": r"data\.path=\[a,b\]: a list is not possible here",
    "data=text data.path=a data.weights=[1,2]": r"data\.weights=\[1,2\]: give names with their "
    r"values, as data\.weights=\{name:value\}",
    "data=text data.path=a data.weights=1": r"data\.weights=1: give names with their values, .*",
    # left open
    "llm=hf": r"llm\.name is not set: give llm\.name=\.\.\. \(.* a local folder, or .*\)",
    "llm=hf llm.name=x": r"layer\.index is not set: give layer\.index=\.\.\. \(.*0.*\)",
    "data=text": r"data\.path is not set: give data\.path=\.\.\. \(File, .* of \.txt / \.md .*\)",
    "data=activations": r"data\.path is not set: give data\.path=.* \.npy or \.parquet\)",
    "data=hub": r"data\.name is not set: give data\.name=\.\.\. \(.*\)",
    "~loss": r"loss is not set: .*",
    # the grammar
    "foo": r"cannot read 'foo': write setting=value, quoted where needed",
    "[1": r"cannot read '\[1': write setting=value, .*",
    "loss.l1=[1": r"cannot read 'loss\.l1=\[1': .*",
    "model=matryoshka model.groups=[choice(1,2)]": r"choice\(\.\.\.\), range\(.* cannot be nes.*",
    "=3": r"every argument has the form setting=value, such as loss\.l1=1e-3",
    "loss.l1=1e-3,1e-2": r"loss\.l1=1e-3,1e-2: several values make a sweep, which needs -m; .*",
    # resume
    "resume=nope": r"nope holds no run \(no config\.yaml\): .*",
    "resume=nope seed=1": r"resume continues a run as it was; seed=1 cannot be given with it\. .*",
}


@pytest.mark.parametrize("typed", mark_most_slow(BAD))
def test_bad_input_is_answered_in_one_line(hydra, typed):
    overrides = typed.split(" ")
    with pytest.raises(Exception) as error:  # noqa: B017, PT011 - Hydra's many kinds
        make_job(compose("config", overrides), Path("folder"), overrides)
    line = explain_error(error.value, overrides)
    assert line is not None, error.value
    assert re.fullmatch(BAD[typed], line), line


OWN = {
    "on_ours": "defaults: [topk, _self_]\nk: 7",
    "on_the_schema": "defaults: [/schema/model/topk@_here_, _self_]\nname: topk\nk: 7",
    "with_its_own_loss": "defaults: [topk, _self_]\nk: 7",
    "of_the_default": "features: 7",
}

NAMELESS = {  # and the line that answers it
    "without_a_name": (
        "defaults: [/schema/model/topk@_here_, _self_]\nk: 7",
        r"model\.name=relu: these are settings of model=topk and model=batch_topk; .* name: topk",
    ),
    "misnamed": ("name: topkk", r"model\.name=topkk: no such architecture; choose from relu, .*"),
}


@pytest.fixture
def own_presets(tmp_path):
    for name, text in OWN.items():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.yaml").write_text(text)
    for name, (text, _) in NAMELESS.items():
        (tmp_path / "model" / f"{name}.yaml").write_text(text)
    (tmp_path / "model" / "broken.yaml").write_text("k: [")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "with_its_own_loss.yaml").write_text("defaults: [topk, _self_]\nauxk: 0.5")
    repository = GlobalHydra.instance().config_loader().repository
    places = ConfigSearchPathImpl()
    for source in repository.get_sources()[:-1]:
        places.append(source.provider, f"{source.scheme()}://{source.path}")
    places.append("command-line", f"file://{tmp_path}")
    places.append("schema", "structured://")
    before = repository.sources
    repository.initialize_sources(places)
    yield tmp_path
    repository.sources = before


@pytest.mark.parametrize("name", OWN)
def test_a_model_preset_of_the_users_brings_the_loss_of_its_architecture(hydra, own_presets, name):
    config = make_job(compose("config", [f"model={name}"]), Path("folder"), []).config
    expected = ARCHITECTURES[config.model.name].loss()
    assert config.model.name == ("relu" if name == "of_the_default" else "topk")
    assert 7 in (config.model.features, getattr(config.model, "k", None))
    if name == "with_its_own_loss":
        expected.auxk = 0.5
    if name == "of_the_default":
        expected.l1 = 2e-3  # that of conf/loss/relu.yaml
    assert config.loss == expected


@pytest.mark.parametrize("name", NAMELESS)
def test_a_model_preset_of_the_users_says_whose_settings_it_holds(hydra, own_presets, name):
    with pytest.raises(UserError) as error:
        make_job(compose("config", [f"model={name}"]), Path("folder"), [])
    assert re.fullmatch(NAMELESS[name][1], str(error.value)), error.value


def test_yaml_of_the_users_that_cannot_be_read_is_told_with_its_line(hydra, own_presets):
    with pytest.raises(MarkedYAMLError) as error:
        compose("config", ["model=broken"])
    line = explain_error(error.value, [])
    assert re.fullmatch(r".*model/broken\.yaml, line 1: .*; correct the YAML there", line), line


@pytest.mark.parametrize(
    "bug",
    [ValueError("x"), KeyError("x"), RuntimeError("CUDA error"), AttributeError("x"), OSError()],
)
def test_a_bug_is_not_explained_away(bug):
    assert explain_error(bug, []) is None
    try:
        try:
            raise bug
        except Exception as inner:
            raise RuntimeError("outer") from inner
    except RuntimeError as outer:
        assert explain_error(outer, []) is None


def test_a_bug_while_a_users_mistake_is_handled_is_told_as_the_mistake():
    """A resolver's UserError comes back wrapped, without `from`."""
    with pytest.raises(KeyError) as error:
        try:
            raise UserError("seed=-1: give more")
        except UserError:
            raise KeyError("wrapped")  # noqa: B904
    assert explain_error(error.value, []) == "seed=-1: give more"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        (tmp_path / "file" / "folder").mkdir()
    line = explain_error(error.value, [])
    assert re.fullmatch(r"cannot read or write .*file.folder: .*; choose another .*", line)


def test_a_file_that_cannot_be_read_is_not_said_to_be_written():
    line = explain_error(OSError(errno.EIO, "Input/output error", "run/sae/cfg.json"), [])
    assert line.startswith("cannot read or write run/sae/cfg.json: Input/output error; ")


def test_a_full_disk_is_told_even_where_no_file_is_named():
    line = explain_error(OSError(28, "No space left on device"), [])
    assert line.startswith(
        "cannot write: No space left on device; choose another folder, or correct"
    )


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv(cli.DEBUG, raising=False)
    return monkeypatch


def test_a_users_error_ends_with_its_line_and_a_bug_with_its_traceback(command_line):
    with pytest.raises(SystemExit) as ended, report_errors():
        raise UserError("seed=-1: give more")
    assert ended.value.code == "error: seed=-1: give more", "printed to stderr, exit code 1"
    with pytest.raises(ZeroDivisionError), report_errors():
        _ = 1 / 0


def test_only_a_list_of_what_is_wrong_in_a_sweep_has_line_breaks():
    assert cli.format_error("a\n  b") == "error: a\u21b5  b"
    assert (
        cli.format_error(f"{cli.SEVERAL_ERRORS}a\n  b\nc")
        == f"error: {cli.SEVERAL_ERRORS}a\n  b\u21b5c"
    )


def test_debugging_keeps_the_traceback(command_line):
    command_line.setenv(cli.DEBUG, "1")
    with pytest.raises(UserError), report_errors():
        raise UserError("seed=-1: give more")


def test_ctrl_c_is_no_error_of_ours(command_line, capsys):
    with pytest.raises(SystemExit) as ended, report_errors():
        raise KeyboardInterrupt
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_of_several_tasks_that_a_cluster_starts_one_analyses_and_the_others_say_why_not(
    command_line,
):
    refuse_other_ranks()
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        command_line.setenv(name, value)
    command_line.setenv("MASTER_ADDR", "127.0.0.1")
    command_line.setenv("MASTER_PORT", "1")
    with (
        pytest.raises(SystemExit, match="^error: task 3 of 4: the first one does all the work"),
        report_errors(),
    ):
        refuse_other_ranks()


@pytest.mark.parametrize("flag", ["--model.features=3", "-x", "--nope"])
def test_a_flag_that_does_not_exist_is_named(command_line, flag):
    command_line.setattr(sys, "argv", ["train.py", "model.features=3", flag])
    answer = f"^error: {flag}: no such flag; .*setting=value"
    with pytest.raises(SystemExit, match=answer), report_errors():
        rewrite_command_line()


@pytest.mark.parametrize("flag", ["--d_sae=64", "--d-sae"])
def test_another_tools_word_is_known_with_dashes_too(command_line, flag):
    command_line.setattr(sys, "argv", ["train.py", flag])
    answer = f"^error: {flag}: no such setting here; use model.features=..."
    with pytest.raises(SystemExit, match=answer), report_errors():
        rewrite_command_line()


def test_no_setting_of_ours_is_taken_for_another_tools(hydra):
    names = set(packaged_job(Path()).config.to_flat_dict()) | {
        "trainer",
        "llm",
        "model",
        "layer",
        "logger",
    }
    assert not names & TRANSLATIONS.keys()
    given = re.findall(r"(\w+(?:\.\w+)*)=", " ".join(TRANSLATIONS.values()).replace("DEVICES=", ""))
    open_ended = {name for name in given if name.startswith("llm.load.")}
    assert {*given} - {"model.k", "data.name", "data.path", "data"} - open_ended <= names


@pytest.mark.parametrize("flags", [["-m"], ["--cfg", "job"], ["--help"], ["-cn", "analyze"], []])
def test_hydras_own_flags_are_let_through(command_line, flags):
    command_line.setattr(sys, "argv", ["train.py", *flags, "seed=1", "~loss"])
    with report_errors():
        rewrite_command_line()


def fail(folder):
    with pytest.raises(SystemExit), report_errors(folder):
        raise UserError("too bad")


def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path, command_line):
    folder = tmp_path / "outputs" / "2026-01-31" / "12-00-00"
    folder.mkdir(parents=True)
    fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_other_runs_of_the_day_stay(tmp_path, command_line):
    day = tmp_path / "outputs" / "2026-01-31"
    for name in ("11-00-00", "12-00-00"):
        (day / name).mkdir(parents=True)
    fail(day / "12-00-00")
    assert [path.name for path in day.iterdir()] == ["11-00-00"]


def test_a_folder_with_anything_in_it_stays(tmp_path, command_line):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("")
    fail(folder)
    assert (folder / CONFIG_FILE).is_file()


def test_a_folder_that_the_user_made_stays(tmp_path, command_line):
    folder = tmp_path / "mine"
    folder.mkdir()
    os.utime(folder, (0, cli.PROCESS_START - 60))  # a minute before the command
    fail(folder)
    assert folder.is_dir()
    os.utime(folder)
    fail(folder)
    assert not folder.exists()
    assert tmp_path.is_dir(), "only a folder named as a day goes with it"


def test_a_folder_that_was_never_made_is_no_trouble(tmp_path, command_line):
    fail(tmp_path / "never")


def test_a_report_that_cannot_be_written_hides_neither_runs_nor_failures(
    tmp_path, monkeypatch, capsys
):
    """Hydra turns what a callback raises into a warning."""
    for name in ("a", "b"):
        folders.begin_run(packaged_job(tmp_path / name))
    folders.record_failure(packaged_job(tmp_path / "b"), "it had to")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / CONFIG_FILE).write_text("")  # damaged

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(sweep, "write_report", full)
    callbacks = Callbacks()
    callbacks.callbacks = [sweep.Sweep()]
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit) as end:
        callbacks.on_multirun_end(config=config)
    assert end.value.code == "error: 3 of the 3 jobs failed, see above"
    said = capsys.readouterr().err
    assert f"(the disk is full); again: python analyze.py task=sweep run={tmp_path}" in said
    reasons = [run.failure for run in folders.read_sweep_runs(tmp_path)]
    assert reasons[:2] == [None, "it had to"]
    assert "config.yaml cannot be read" in reasons[2]
