"""Every task of `analyze.py` is a preset of Hydra's group `task`."""

import copy
import json
import math
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import (
    BooleanNode,
    DictConfig,
    EnumNode,
    ListConfig,
    OmegaConf,
    StringNode,
    ValidationError,
)
from planted import save_planted

from sae_lightning.analysis import subject
from sae_lightning.analysis.task import suggest_commands
from sae_lightning.analysis.tasks import TASKS
from sae_lightning.errors import UserError
from sae_lightning.files import make_jsonable
from sae_lightning.runs.arguments import check_arguments
from sae_lightning.runs.cli import explain_error
from sae_lightning.runs.config import find_conf_folder, to_dataclass
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.sae import ARCHITECTURES

# what a task cannot do without
NEEDED = {"steer": ["feature=3"], "text": ["text=hello"], "export": ["format=saelens", "to=x"]}
NEEDED |= {"publish": ["repo=me/sae"]}


@pytest.fixture(autouse=True)
def hydra():
    register_schemas(TASKS)
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        yield
    del ConfigStore.instance().repo["task"]


def test_another_tools_words_are_not_answered_with_settings_of_training():
    with pytest.raises(Exception) as found:
        asked("overview", "num_tokens=3")
    line = explain_error(found.value, ["num_tokens=3"])
    assert line.startswith("no setting num_tokens: did you mean tokens? there are run, task, ")
    with pytest.raises(UserError, match="^--num_tokens: no such flag; "):
        check_arguments(["--num_tokens", "3"])


def asked(task: str, *overrides: str):
    return to_dataclass(
        compose("analyze", ["run=x", f"task={task}", *NEEDED.get(task, []), *overrides])
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_composes_with_its_settings(task):
    config = asked(task)
    assert type(config) is TASKS[task]
    assert (config.task, config.llm.name) == (task, "smollm2")


def test_the_default_is_the_overview():
    assert to_dataclass(compose("analyze", ["run=x"])).task == "overview"


@pytest.mark.slow
def test_steering_is_typed_as_the_readme_does():
    config = asked("steer", "strength=8", 'prompt="There once was a cat"')
    assert (config.feature, config.strength, config.prompt) == (3, [8], "There once was a cat")
    assert asked("steer", "strength=[2,-4.5]").strength == [2, -4.5]


def test_a_setting_of_another_task_is_refused_by_name():
    with pytest.raises(Exception) as found:
        asked("features", "strength=8")
    assert explain_error(found.value, []) == (
        "strength has no meaning for this task, only for task=steer: leave it out"
    )


def test_json_holds_plain_values_only():
    class Mode(Enum):
        add = 1

    class Found(NamedTuple):
        mode: Mode
        numbers: tuple

    value = make_jsonable({"found": Found(Mode.add, (1, math.nan, None)), 3: math.inf})
    assert value == {"found": {"mode": "add", "numbers": [1, None, None]}, "3": None}
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.slow
@pytest.mark.parametrize("value", ["inf", "nan", "true", "[]", "much"])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(UserError, match="feature=.*: give a (finite )?number"):
        asked("lens", f"feature={value}")


def numeric(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The settings that hold numbers, or may, and the class that each belongs to."""
    for name in cfg:
        node = cfg._get_node(name)
        if isinstance(node, DictConfig):
            yield from numeric(node, f"{prefix}{name}.")
        elif isinstance(node, ListConfig) and node._metadata.element_type is str:
            continue
        elif not isinstance(node, StringNode | EnumNode | BooleanNode):
            yield prefix + name, OmegaConf.get_type(cfg)


@pytest.mark.slow
def test_no_setting_takes_nan_or_infinity():
    commands = [("analyze", ["run=x", f"task={t}", *NEEDED.get(t, [])]) for t in TASKS]
    commands += [("config", [f"model={model}"]) for model in ARCHITECTURES]
    data = (["data=synthetic"], ["data=text", "data.path=/x"], ["data=hub", "data.name=x"])
    tried = set()
    for command in [*commands, *(("config", d) for d in data)]:
        whole = compose(*command)
        for setting, owner in numeric(whole):
            # those of a group, such as llm, are tried once for each class of settings
            key = (setting, owner if "." in setting else str(command))
            if key in tried:
                continue
            tried.add(key)
            for value in (math.nan, math.inf, -math.inf, [math.nan]):
                cfg = copy.deepcopy(whole)
                with pytest.raises((UserError, ValidationError)) as found:
                    OmegaConf.update(cfg, setting, value)
                    to_dataclass(cfg)
                assert explain_error(found.value, []).startswith(setting)
    assert len(tried) > 100


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    _, sae = save_planted(tmp_path)
    (sae / "analysis").write_text("")  # as good as a folder of someone else
    config = asked("features", f"run={sae}")
    with pytest.raises(UserError, match=r"analysis cannot be written to: copy .*sae .* as run="):
        config.execute(["run", "task"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("steer", "prompt=''", "prompt=: empty"),
        ("steer", "tokens=40", "prompt: its .* tokens and tokens=40 new ones are more than the 31"),
        ("steer", "feature=99", "feature=99: this SAE has 32 features"),
        ("lens", "feature=99", "feature=99: this SAE has 32 features"),
        ("explain", "feature=99", "feature=99: this SAE has 32 features"),
        ("lens", "contexts=1000000", "contexts=1000000: give at most 1000"),
        ("probe", "label=nope", "label=nope: the packaged plays have genre, play, speaker"),
        ("text", "text=' '", "text: there is no word in it"),
        ("features", "data.held_out=[nope]", "data.held_out: no play named nope"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_llm_is_loaded(
    kept, monkeypatch, task, setting, message
):
    monkeypatch.setattr(subject, "load_llm", lambda *_: pytest.fail("the LLM was loaded"))
    with pytest.raises(UserError, match=f"^{message}"):
        name = setting.partition("=")[0]
        asked(task, f"run={kept}", setting).execute(["run", name])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of an SAE that is only read."""
    return save_planted(tmp_path_factory.mktemp("planted"))[1]


def test_what_to_ask_next_is_about_the_feature_that_was_asked_for(tmp_path):
    _, sae = save_planted(tmp_path)
    asked("lens", f"run={sae}", "feature=[5,7]", "direct=true").execute(["run", "task", "feature"])
    page = (sae / "analysis" / "lens.html").read_text()
    assert all(f"run={sae} task={task} feature=5" in page for task in ("lens", "steer", "explain"))
    assert suggest_commands(str(sae), None) == [f"python analyze.py run={sae}"]


def test_the_readme_has_the_example_that_is_tested():
    from test_analyze import EXAMPLE

    assert EXAMPLE.strip() in Path(__file__).parents[2].joinpath("README.md").read_text("utf8")
