"""Commands that are refused print one line, exit with code 1 and leave nothing behind."""

import json
import re
from pathlib import Path

import pytest
from forked import run_script
from tiny_run import packaged_job, write_text

from sae_lightning.runs.jobs import CONFIG_FILE, format_config


def one_line(done) -> str:
    """The one line of a command that was refused."""
    # the imports of a run that composed take seconds, and say so
    assert re.fullmatch(r"(starting: done in \d+ s\n)?", done.stdout)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr.removeprefix("error: ").strip()


@pytest.mark.slow
def test_train_refuses_in_one_line_and_leaves_nothing_behind(tmp_path):
    line = one_line(run_script("train.py", "layer=9", cwd=tmp_path))
    assert line.endswith("for a value write layer.index=9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
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
    (tmp_path / "old" / CONFIG_FILE).write_text(format_config(packaged_job(tmp_path)))
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
    (tmp_path / "old" / CONFIG_FILE).write_text(format_config(packaged_job(tmp_path)))
    line = one_line(run_script("analyze.py", "run=old", cwd=tmp_path))
    assert line.startswith("old holds no saved SAE")


@pytest.mark.slow
def test_the_environment_variable_brings_the_traceback_back(tmp_path):
    done = run_script("train.py", "layer=9", cwd=tmp_path, SAE_LIGHTNING_DEBUG="1")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "error: " not in done.stderr.splitlines()[0]
