"""A stranger's run or sweep folder runs no code and reads no secrets; ours are read as ever."""

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import run_script
from hydra import compose
from omegaconf import OmegaConf

from sae_lightning.analysis.metadata import config_from_metadata
from sae_lightning.analysis.subject import open_subject
from sae_lightning.errors import UserError
from sae_lightning.llm.load import LLMConfig
from sae_lightning.llm.sites import LayerConfig
from sae_lightning.runs.config import Config
from sae_lightning.runs.folders import read_sweep_runs
from sae_lightning.runs.jobs import (
    CONFIG_FILE,
    Job,
    format_config,
    format_resume_command,
    make_job,
    make_jobs,
    read_job,
)
from sae_lightning.runs.sweep import HYDRA_RECORD, Sweep
from sae_lightning.sae import SAEConfig
from sae_lightning.sae.relu import ReLULoss
from sae_lightning.stream.plays import PlaysConfig

TRUST = "llm.trust_remote_code=true"
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import PreTrainedConfig

class Evil(PreTrainedConfig):
    model_type = "evil"
"""


@pytest.fixture
def marker(tmp_path):
    """The file that the Python code in the folder `llm` leaves when it runs."""
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "evil.py").write_text(CODE.format(marker=str(tmp_path / "it ran")))
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (llm / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    maps = {"AutoTokenizer": ["evil.Evil", None]}
    (llm / "tokenizer_config.json").write_text(json.dumps({"auto_map": maps}))
    return tmp_path / "it ran"


def write_run(folder: Path, llm: Path | str, trusting: bool = True) -> Path:
    """A run that wants its LLM's own code to run."""
    config = Config(
        llm=LLMConfig(name=str(llm), trust_remote_code=trusting, device="cpu"),
        data=PlaysConfig(),
        layer=LayerConfig(index=0),
        model=SAEConfig(features=8),
        loss=ReLULoss(),
    )
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(format_config(Job(config=config, folder=folder)))
    return folder


def write_text(folder: Path, old: str, new: str) -> str:
    """Another text in the config of a run."""
    text = (folder / CONFIG_FILE).read_text()
    assert old in text
    (folder / CONFIG_FILE).write_text(text.replace(old, new))
    return text


def resumed(*overrides: str) -> list[Job]:
    """The jobs of `train.py -m` with these."""
    return make_jobs(compose("config", [*overrides]), Path("new"), [*overrides], Path("sweep"))


ASKED = {"llm": LLMConfig(name="smollm2"), "data": PlaysConfig(), "layer": LayerConfig(index=0)}
OPENERS = {
    "resume": lambda run, *typed: make_job(
        compose("config", [f"resume={run}", *typed]), Path("new"), [f"resume={run}", *typed]
    ),
    "-m resume": lambda run, *typed: resumed(f"resume={run}", *typed),
    "-m resume of the sweep": lambda run, *typed: resumed(f"resume={run.parent}", *typed),
    "read_job": lambda run, *typed: read_job(run, trusted=bool(typed)),
    "analyze": lambda run, *typed: open_subject(
        str(run),
        ASKED | {"seed": 0, "llm": LLMConfig(name="smollm2", trust_remote_code=bool(typed))},
        [name.partition("=")[0] for name in typed],
    ),
}


@pytest.mark.parametrize("opener", OPENERS)
def test_what_a_folder_says_never_allows_code(hydra, tmp_path, marker, opener):
    run = write_run(tmp_path / "sweep" / "run", marker.parent / "llm")
    with pytest.raises(UserError) as error:
        OPENERS[opener](run)
    assert str(error.value) == (
        f"{run / CONFIG_FILE}: llm.trust_remote_code=true would run the Python code that comes "
        f"with {marker.parent / 'llm'}: read that code first, then allow it by adding {TRUST} to "
        "this command"
    )
    assert not marker.exists()


@pytest.mark.parametrize("opener", [name for name in OPENERS if name != "analyze"])
def test_typed_in_the_command_it_is_allowed(hydra, tmp_path, opener):
    opened = OPENERS[opener](write_run(tmp_path / "sweep" / "run", "llm"), TRUST)
    (this,) = opened if isinstance(opened, list) else [opened]
    assert this.config.llm.trust_remote_code
    assert TRUST in format_resume_command([this]), "the command that continues it is complete"


def test_permission_that_a_run_does_not_need_changes_nothing_about_it(hydra, tmp_path):
    run = write_run(tmp_path / "run", "llm", trusting=False)
    this = OPENERS["resume"](run, TRUST)
    assert not this.config.llm.trust_remote_code, "a run goes on as it was"


@pytest.mark.parametrize("typed", ["llm", "llm.trust_remote_code"])
def test_an_analysis_goes_by_what_was_typed_and_not_by_the_folder(tmp_path, typed):
    run = write_run(tmp_path / "run", "llm")
    with pytest.raises(UserError, match="holds no saved SAE"):  # past the settings
        open_subject(str(run), ASKED | {"seed": 0}, [typed])


def test_the_report_of_a_sweep_is_written_without_permission(tmp_path):
    run = write_run(tmp_path / "sweep" / "run", "llm")
    (read,) = read_sweep_runs(tmp_path / "sweep")
    assert (read.folder, read.status) == (run, "unfinished")


SECRET = "hunter2"
HOSTILE = {
    # what is in the place of `index: 0`, and what is named
    "an interpolation": ("index: ${oc.env:SECRET}", "layer.index holds the interpolation"),
    "one in quotes": ('index: "\\x24{oc.env:SECRET}"', "layer.index holds the interpolation"),
    "one as part": ("index: a ${oc.env:SECRET} b", "layer.index holds the interpolation"),
    "one in a list": ("index: [1, {a: '${oc.env:SECRET}'}]", "layer.index.a holds the interp"),
    "one beside a secret": (
        f"index: {SECRET} ${{seed}} {SECRET}",
        "layer.index holds the interpol",
    ),
    "one as a key": ("'${oc.env:SECRET}': 0", "layer holds the interpolation"),
    "another setting": ("index: ${seed}", "layer.index holds the interpolation '${seed}'"),
    "an anchor": ("index: &a 0", "layer.index holds an anchor or alias"),
    "an alias": ("index: *a", "layer.index holds an anchor or alias"),
    "a merge key": ("index: 0\n  <<: {index: 0}", "layer holds a merge key"),
    "a tag": ("index: !!int 0", "layer.index holds the tag 'tag:yaml.org,2002:int'"),
    "a tag of Python": ("index: !!python/object/apply:os.getpid []", "layer.index holds the tag"),
    "a tag of ours": ("index: !a 0", "layer.index holds the tag '!a'"),
    "a list as a key": ("? [a]\n  : 0", "layer holds a key that is not a word"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_plain_is_refused_with_its_key(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("SECRET", SECRET)
    hostile, named = HOSTILE[kind]
    run = write_run(tmp_path / "run", "llm", trusting=False)
    write_text(run, "index: 0", hostile)
    with pytest.raises(UserError) as error:
        read_job(run)
    line = str(error.value)
    assert line.startswith(f"{run / CONFIG_FILE}: {named}")
    assert "\n" not in line and SECRET not in line


@pytest.mark.parametrize(
    "overrides",
    ["${run_folder:${oc.env:SECRET}}", "${oc.env:SECRET}", "[['${oc.env:SECRET}']]", "${seed}"],
)
def test_what_stands_for_what_was_typed_is_resolved_by_nobody(
    hydra, tmp_path, monkeypatch, overrides
):
    monkeypatch.setenv("SECRET", SECRET)
    run = write_run(tmp_path / "sweep" / "run", "llm", trusting=False)
    write_text(run, "overrides: []", f"overrides: {overrides}")
    (told,) = read_sweep_runs(tmp_path / "sweep")
    assert (
        told.failure == f"{run / CONFIG_FILE} cannot be read: overrides is not a list of overrides"
    )


@pytest.mark.parametrize("level", ["[", "{a: "])
def test_a_bomb_of_levels_is_refused_at_once(tmp_path, level):
    run = write_run(tmp_path / "run", "llm", trusting=False)
    write_text(run, "index: 0", f"index: {level * 50_000}")
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"layer\.index.* holds more than 20 nested groups or lists"
    ):
        read_job(run)
    assert time.monotonic() - started < 5  # unpacked, a bomb takes minutes


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    levels = [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(9)
    ]
    run = write_run(tmp_path / "run", "llm", trusting=False)
    write_text(run, "index: 0", "index: 0\n" + "\n".join(f"  {level}" for level in levels))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"layer\.a0 holds an anchor or alias"):
        read_job(run)
    assert time.monotonic() - started < 5  # unpacked, a bomb takes minutes


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("index: 0", "index: 0\n  _target_: os.getcwd", "_target_"),
        ("\nsweep:", "\nhydra: {launcher: {_target_: os.getcwd}}\nsweep:", "hydra"),
        ("device: cpu", "device: cpu\n  auto_map: {AutoConfig: evil.Evil}", "auto_map"),
        ("overrides: []", "overrides: [{_target_: os.getcwd}]", "overrides is not a list of"),
        ("overrides: []", "overrides: {a: 1}", "overrides is not a list of"),
    ],
)
def test_a_class_to_be_made_is_no_setting(tmp_path, old, new, named):
    run = write_run(tmp_path / "run", "llm", trusting=False)
    write_text(run, old, new)
    with pytest.raises(UserError, match=named):
        read_job(run)


def test_what_was_typed_stays_text(hydra, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    run = write_run(tmp_path / "run", "llm", trusting=False)
    write_text(run, "overrides: []", "overrides: ['seed=${oc.env:SECRET}']")
    this = read_job(run)
    assert this.overrides == ["seed=${oc.env:SECRET}"]
    assert SECRET not in format_config(this)


COMMANDS = [
    ("analyze.py", "run=sweep/run"),
    ("train.py", "resume=sweep/run"),
    ("train.py", "-m", "resume=sweep"),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_strangers_folder_runs_no_code_at_the_command_line(tmp_path, marker, command):
    write_run(tmp_path / "sweep" / "run", marker.parent / "llm")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = run_script(*command, cwd=tmp_path, SECRET=SECRET)
    assert (done.returncode, done.stdout.count("Traceback")) == (1, 0)
    assert done.stderr.count("\n") == 1
    assert "llm.trust_remote_code=true" in done.stderr and "read that code first" in done.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not marker.exists()


@pytest.mark.slow
def test_the_same_folder_runs_its_code_where_that_is_typed(tmp_path, marker):
    """Without which the test above would say nothing."""
    write_run(tmp_path / "run", marker.parent / "llm")
    run_script("train.py", "resume=run", TRUST, cwd=tmp_path)
    assert marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_strangers_folder_reads_no_secret_at_the_command_line(tmp_path, command):
    run = write_run(tmp_path / "sweep" / "run", "llm", trusting=False)
    write_text(run, "name: llm", "name: ${oc.env:SECRET}")
    done = run_script(*command, cwd=tmp_path, SECRET=SECRET)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {command[-1].partition('=')[2]}")
    assert "llm.name holds the interpolation '${oc.env:SECRET}'" in done.stderr
    texts = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert SECRET not in done.stdout + done.stderr
    assert not any(SECRET.encode() in text for text in texts)


def begin_sweep(folder: Path, *overrides: str) -> Sweep:
    """What Hydra does at the start of `train.py -m` with these, up to its record."""
    overrides = [f"hydra.sweep.dir={folder}", *overrides]
    config = compose("config", overrides, return_hydra_config=True)
    callback = Sweep()
    callback.on_multirun_start(config)
    folder.mkdir(exist_ok=True)
    (folder / HYDRA_RECORD).write_text("another's")
    return callback


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ("hydra: {overrides: {task: [&a x, *a]}}", "hydra.overrides.task holds an anchor"),
        ("hydra: !a {}", "hydra holds the tag '!a'"),
        ("hydra: {overrides: {task: ['seed=range(0,1000000001)', 'a=${oc.env:SECRET}']}}", None),
        (f"hydra: {{overrides: {{task: ['a={'choice(' * 2000}1{')' * 2000}']}}}}", ""),
        (f"hydra: {{overrides: {{task: {[f'a{n}=range(0,1e300)' for n in range(20)]}}}}}", ""),
    ],
)
def test_hydras_record_of_a_strangers_sweep_is_text(
    hydra, tmp_path, monkeypatch, capsys, record, answer
):
    monkeypatch.setenv("SECRET", SECRET)
    folder = write_run(tmp_path / "sweep" / "run", "llm", trusting=False).parent
    (folder / HYDRA_RECORD).write_text(record)
    if answer:
        with pytest.raises(SystemExit, match=f"multirun.yaml: {re.escape(answer)}"):
            begin_sweep(folder, f"resume={folder}")
        return
    begin_sweep(folder, f"resume={folder}")
    said = capsys.readouterr().out
    if answer == "":
        assert said == ""
        return
    assert "1000000000 of the 1000000001 jobs of this sweep never began" in said
    assert SECRET not in said


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["the record of a sweep", None])
def test_a_sweep_that_adds_no_run_leaves_the_record_of_another(hydra, tmp_path, kept):
    folder = write_run(tmp_path / "sweep" / "run", "llm", trusting=False).parent
    if kept:
        (folder / HYDRA_RECORD).write_text(kept)
    refused = begin_sweep(folder)
    refused._restore_record()  # when the process ends
    assert sorted(path.name for path in folder.iterdir()) == [*[HYDRA_RECORD] * bool(kept), "run"]
    assert not kept or (folder / HYDRA_RECORD).read_text() == kept
    begun = begin_sweep(folder)
    write_run(folder / "new", "llm", trusting=False)
    begun._restore_record()
    assert (folder / HYDRA_RECORD).read_text() == "another's"


def test_hydras_record_is_written_through_no_other_name_and_into_no_pipe(hydra, tmp_path):
    folder = write_run(tmp_path / "sweep" / "run", "llm", trusting=False).parent
    (tmp_path / "mine").write_text("mine")
    (folder / HYDRA_RECORD).hardlink_to(tmp_path / "mine")
    begin_sweep(folder)._restore_record()
    assert (tmp_path / "mine").read_text() == (folder / HYDRA_RECORD).read_text() == "mine"
    (folder / HYDRA_RECORD).unlink()
    os.mkfifo(folder / HYDRA_RECORD)
    with pytest.raises(SystemExit, match=r"multirun\.yaml is a symbolic link, .*, or a pipe"):
        begin_sweep(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, "metrics.json", "failure.json"])
@pytest.mark.parametrize("endless", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_file_without_end_is_damage_and_not_waited_for(tmp_path, name, endless):
    run = write_run(tmp_path / "sweep" / "run", "llm", trusting=False)
    (run / name).unlink(missing_ok=True)
    endless(run / name)
    (told,) = read_sweep_runs(run.parent)
    assert (told.status, str(run / name) in told.failure) == ("damaged", True)


def test_a_run_is_no_place_for_a_sweep(hydra, tmp_path):
    run = write_run(tmp_path / "run", "llm", trusting=False)
    with pytest.raises(SystemExit, match=f"hydra.sweep.dir={run}: holds a run; a sweep needs"):
        begin_sweep(run)
    assert [path.name for path in run.iterdir()] == [CONFIG_FILE]


def test_a_config_of_version_0_1_0_is_read(tmp_path):
    """The same plain YAML, with fewer settings."""
    run = write_run(tmp_path / "run", "llm", trusting=False)
    saved = OmegaConf.to_container(OmegaConf.load(run / CONFIG_FILE))
    for group, name in (("data", "kind"), ("data", "cache"), ("llm", "trust_remote_code")):
        del saved[group][name]
    (run / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(saved)))
    assert read_job(run).config == Config(
        llm=LLMConfig(name="llm", device="cpu"),
        data=PlaysConfig(),
        layer=LayerConfig(index=0),
        model=SAEConfig(features=8),
        loss=ReLULoss(),
    )


def test_what_an_saes_own_file_says_never_allows_code():
    hostile = {"trust_remote_code": True, "sae_lightning": {"llm.trust_remote_code": True}}
    hostile |= {"model_name": "someone/evil", "hook_name": "blocks.0.hook_resid_post"}
    hostile |= {"llm": {"trust_remote_code": True}, "auto_map": {"AutoConfig": "evil.Evil"}}
    sae = SimpleNamespace(metadata=hostile, config=SAEConfig(features=8))
    config = config_from_metadata(sae, "folder", ASKED | {"seed": 0}, [])
    assert (config.llm.name, config.llm.trust_remote_code) == ("someone/evil", False)


def test_the_tokens_of_an_llm_may_be_given_without_its_name():
    said = {"model_name": "someone/llm", "hook_name": "blocks.0.hook_resid_post"}
    sae = SimpleNamespace(metadata=said, config=SAEConfig(features=8))
    asked = ASKED | {"seed": 0, "llm": LLMConfig(name="other", bos="<s>")}
    for given, bos in ((["llm.bos"], "<s>"), ([], None)):
        llm = config_from_metadata(sae, "folder", asked, given).llm
        assert (llm.name, llm.bos) == ("someone/llm", bos)
