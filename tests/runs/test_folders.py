"""A run whose files are damaged is shown as damaged, and the others of its sweep as they are."""

import csv
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_run import write_begun_run

from sae_lightning.files import write_json
from sae_lightning.report.sweep_report import write_report
from sae_lightning.runs import folders
from sae_lightning.runs.jobs import CONFIG_FILE
from sae_lightning.training.settings import locate_failure

SCORES = {"l0": 20.5, "explained_variance": 0.75}
GOOD = {"tokens": 1024, "held_out": SCORES, "training": {"train/dead": 0.0}}


@pytest.fixture
def sweep(tmp_path):
    """Run folders of two finished jobs, l1=1 and l1=2."""
    for l1 in ("1", "2"):
        write_json(write_begun_run(tmp_path, l1) / folders.METRICS_FILE, GOOD)
    return tmp_path


METRICS = {
    "no JSON": "{",
    "too deep": "[" * 100_000,
    "a list": "[1]",
    "a number": "3",
    "null": "[null]",
    "empty": "{}",
    "no object of metrics": {"held_out": [1]},
    "a metric is missing": {"held_out": {"l0": 3}},
    "a word": {"held_out": SCORES | {"l0": "many"}},
    "a list of numbers": {"held_out": SCORES | {"l0": [1]}},
    "true": {"held_out": SCORES | {"l0": True}},
    "an integer beyond any table": {"held_out": SCORES | {"l0": 10**400}},
    "a word in training": GOOD | {"training": {"train/dead": "few"}},
    "no number of tokens": GOOD | {"tokens": "many"},
}


def report(sweep) -> list[dict[str, str]]:
    """The rows of the written report."""
    write_report(sweep, folders.read_sweep_runs(sweep))
    with open(sweep / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("content", METRICS.values(), ids=METRICS)
def test_metrics_of_another_shape_are_damage_of_one_run(sweep, content, capsys):
    text = content if isinstance(content, str) else json.dumps(content)
    path = sweep / "loss.l1=2" / folders.METRICS_FILE
    path.write_text(text)
    rows = report(sweep)
    assert [row["status"] for row in rows] == ["finished", "damaged"]
    assert (rows[0]["l0"], rows[0]["tokens"]) == ("20.5", "1024")
    assert rows[1]["reason"].startswith(f"{path} is damaged: it ")
    assert f"damaged: loss.l1=2: {path} is damaged" in capsys.readouterr().out
    assert ">1 damaged<" in (sweep / "sweep.html").read_text()
    assert folders.read_metrics(path.parent) is None, "resumed, it is scored again"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"reason": 3}', '"it failed"'])
def test_a_failure_of_another_shape_is_damage_of_one_run(sweep, content):
    path = locate_failure(sweep / "loss.l1=2")
    path.write_text(content)
    assert [row["status"] for row in report(sweep)] == ["finished", "damaged"]
    assert folders.read_failure(path.parent) is None


def test_a_failure_of_version_0_1_0_is_read(sweep):
    locate_failure(sweep / "loss.l1=2").write_text('{"reason": "its loss became nan"}')
    assert folders.read_failure(sweep / "loss.l1=2")["diverged"] is False
    assert [row["reason"] for row in report(sweep)] == ["", "its loss became nan"]


def test_settings_that_cannot_be_read_are_damage_of_one_run(sweep):
    (sweep / "loss.l1=2" / CONFIG_FILE).write_text("model: [")
    assert sorted(row["status"] for row in report(sweep)) == ["damaged", "finished"]


def test_names_that_are_used_twice_do_not_end_the_report(sweep):
    names = {"status": 1, "folder": 2, "tokens": 3, "loss.l1": 4, "reason": 5}
    write_json(sweep / "loss.l1=2" / folders.METRICS_FILE, GOOD | {"held_out": SCORES | names})
    config = sweep / "loss.l1=1" / CONFIG_FILE
    config.write_text(config.read_text().replace("- loss.l1=1", "- loss.l1=1\n- tokens=5"))
    rows = report(sweep)
    assert [row["loss.l1"] for row in rows] == ["1", "2"]
    assert [row["status"] for row in rows] == ["finished", "finished"]


def test_json_never_holds_nan_and_gives_it_back(sweep):
    path = sweep / "loss.l1=2" / folders.METRICS_FILE
    scores = SCORES | {"kl": math.nan, "mse": math.inf, "l0": -math.inf}
    before = {"ce_clean": 1.0, "ce_spliced": math.nan}
    write_json(path, GOOD | {"held_out": scores, "before_kl": before})

    def refuse(word):
        raise AssertionError(word)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert [content["held_out"][name] for name in ("kl", "mse", "l0")] == [None] * 3
    read = folders.read_metrics(path.parent)["held_out"]
    assert all(math.isnan(read[name]) for name in ("kl", "mse", "l0"))
    assert [row["kl"] for row in report(sweep)] == ["", "nan"], "measured, and missing"


def test_metrics_in_which_an_earlier_version_wrote_nan_are_read(sweep):
    path = sweep / "loss.l1=2" / folders.METRICS_FILE
    path.write_text(json.dumps(GOOD | {"held_out": SCORES | {"kl": math.nan}}))
    assert math.isnan(folders.read_metrics(path.parent)["held_out"]["kl"])


def test_of_many_that_start_at_the_same_time_each_gets_a_folder(tmp_path):
    path = tmp_path / "outputs" / "2026-01-31" / "12-00-00"
    with ThreadPoolExecutor(8) as pool:
        made = [*pool.map(folders.make_unique_folder, [path] * 40)]
    assert sorted(made) == sorted(path.parent.iterdir())
    names = {path.name, *(f"{path.name}-{number}" for number in range(2, 41))}
    assert {folder.name for folder in made} == names


def test_a_folder_that_cannot_be_made_is_an_error_and_no_search_without_end(tmp_path):
    (tmp_path / "outputs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="outputs"):
        folders.make_unique_folder(tmp_path / "outputs" / "12-00-00")
