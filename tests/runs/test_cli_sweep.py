"""`python analyze.py task=sweep`: the report of a multirun, written again."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_script
from tiny_run import write_begun_run

ROOT = Path(__file__).parents[2]
SWEEP = Path("multirun", "2026-01-31", "12-00-00")


def make_sweep(folder: Path) -> None:
    """Run folders of three jobs: one finished, one failed, one killed."""
    for l1 in ("0.01", "0.001", "1"):
        write_begun_run(folder, l1, "seed=0")
    held_out = {"l0": 20.5, "explained_variance": 0.75, "ce_recovered": 0.875}
    (folder / "loss.l1=0.01" / "metrics.json").write_text(
        json.dumps({"tokens": 1024, "held_out": held_out, "training": {"train/dead": 0.0}})
    )
    (folder / "loss.l1=1" / "failure.json").write_text(
        json.dumps({"reason": "its loss became nan", "tokens": 512})
    )


@pytest.mark.slow
def test_the_report_of_a_sweep_is_written_again_as_it_is_pasted(tmp_path):
    make_sweep(tmp_path / SWEEP)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    done = run_script("analyze.py", "task=sweep", f"run=../{SWEEP}", cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert "failed: loss.l1=1: its loss became nan" in done.stdout
    assert "1 of 3 runs did not finish" in done.stdout
    with open(tmp_path / SWEEP / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss.l1"], row["status"]) for row in rows] == [
        ("0.001", "unfinished"),
        ("0.01", "finished"),
        ("1", "failed"),
    ]
    assert float(rows[1]["ce_recovered"]) == 0.875
    page = (tmp_path / SWEEP / "sweep.html").read_text("utf8")
    assert "<h1>Sweep of loss.l1</h1>" in page
    assert "smollm2" in page
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=sweep", "run=nope"], r"nope holds no runs of a sweep: give its folder, .*"),
        (["task=sweep", "run=multirun"], r"multirun holds no runs of a sweep: .*"),
        (
            ["task=sweep", f"run={SWEEP / 'loss.l1=1'}"],
            rf".*/loss\.l1=1 holds one run, not a sweep: leave out task=sweep .* \(run={SWEEP}\)",
        ),
        ([f"run={SWEEP}"], rf"{SWEEP} holds a sweep: give one of the run folders in it, .*"),
        ([f"run={SWEEP / 'loss.l1=1'}"], r".*/loss\.l1=1 holds no saved SAE: .*"),
        (["task=sweep", f"run={SWEEP}", "tokens=5"], r"tokens has no meaning for this task, .*"),
        (["task=sweep", f"run={SWEEP}", "seed=5"], r"seed has no meaning for task=sweep, .*"),
    ],
)
def test_the_wrong_folder_is_answered_in_one_line(tmp_path, overrides, message):
    make_sweep(tmp_path / SWEEP)
    before = sorted(tmp_path.rglob("*"))
    done = run_script("analyze.py", *overrides, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {message}\n", done.stderr), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_sweep_with_a_planted_link_is_not_taken_up(tmp_path):
    make_sweep(tmp_path / SWEEP)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / SWEEP / "multirun.yaml").symlink_to(tmp_path / "victim")
    done = run_script("train.py", "-m", f"resume={SWEEP}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*/multirun\.yaml is a symbolic link, .*\n", done.stderr)
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.slow
def test_reading_a_sweep_imports_no_llm_and_training_imports_no_plots():
    """The report takes a second or two; `train.py` pays for it only when a multirun ends."""
    code = "import sys, {}; print(sorted({} & set(sys.modules)))"
    heavy = {"lightning", "transformers", "datasets", "plotly", "pandas", "jinja2"}
    for modules in ("analyze", "train", "sae_lightning.report.sweep_report"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code.format(modules, heavy)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
