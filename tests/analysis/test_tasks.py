"""Every task of `analyze.py` is a preset of Hydra's group `task`."""

import json
import math
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from planted import save_planted

from sae_lightning.analysis.task import following, jsonable
from sae_lightning.analysis.tasks import TASKS
from sae_lightning.errors import UserError
from sae_lightning.runs.cli import explain
from sae_lightning.runs.config import conf_folder, typed
from sae_lightning.runs.jobs import register

NEEDED = {"steer": ["feature=3"]}  # what a task cannot do without


@pytest.fixture(autouse=True)
def hydra():
    register(TASKS)
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        yield


def asked(task: str, *overrides: str):
    return typed(compose("analyze", ["run=x", f"task={task}", *NEEDED.get(task, []), *overrides]))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_composes_with_its_settings(task):
    config = asked(task)
    assert type(config) is TASKS[task]
    assert (config.task, config.llm.name) == (task, "smollm2")


def test_the_default_is_the_overview():
    assert typed(compose("analyze", ["run=x"])).task == "overview"


def test_steering_is_typed_as_the_readme_does():
    config = asked("steer", "strength=8", 'prompt="There once was a cat"')
    assert (config.feature, config.strength, config.prompt) == (3, [8], "There once was a cat")
    assert asked("steer", "strength=[2,-4.5]").strength == [2, -4.5]


def test_a_setting_of_another_task_is_refused_by_name():
    with pytest.raises(Exception) as found:
        asked("features", "strength=8")
    assert explain(found.value, []) == (
        "strength has no meaning for this task, only for task=steer: leave it out"
    )


def test_json_holds_plain_values_only():
    class Mode(Enum):
        add = 1

    class Found(NamedTuple):
        mode: Mode
        numbers: tuple

    value = jsonable({"found": Found(Mode.add, (1, math.nan, None)), 3: math.inf})
    assert value == {"found": {"mode": "add", "numbers": [1, None, None]}, "3": None}
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize("value", ["inf", "nan", "true", "[]", "much"])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(UserError, match="feature=.*: give a number, or several"):
        asked("lens", f"feature={value}")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    _, sae = save_planted(tmp_path)
    (sae / "analysis").write_text("")  # as good as a folder of someone else
    config = asked("features", f"run={sae}")
    with pytest.raises(UserError, match=r"analysis cannot be written to: copy .*sae .* as run="):
        config.answer(["run", "task"])


def test_what_to_ask_next_is_about_the_feature_that_was_asked_for(tmp_path):
    _, sae = save_planted(tmp_path)
    asked("lens", f"run={sae}", "feature=[5,7]", "direct=true").answer(["run", "task", "feature"])
    page = (sae / "analysis" / "lens.html").read_text()
    assert all(f"run={sae} task={task} feature=5" in page for task in ("lens", "steer", "explain"))
    assert following(sae, None) == [f"python analyze.py run={sae}"]


def test_the_readme_has_the_example_that_is_tested():
    from test_analyze import EXAMPLE

    assert EXAMPLE.strip() in Path(__file__).parents[2].joinpath("README.md").read_text("utf8")
