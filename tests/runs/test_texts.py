"""Texts and paths reach Hydra as they are typed, in a sweep too."""

from dataclasses import replace

import pytest
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_lightning.analysis.tasks import TASKS
from sae_lightning.errors import UserError
from sae_lightning.runs.arguments import (
    find_text_settings,
    join_sweep_values,
    quote_texts,
    wrap_settings_of_swept_groups,
)
from sae_lightning.runs.jobs import CONFIG_FILE, format_config, make_job, read_job
from sae_lightning.runs.schemas import register_schemas


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


def test_a_text_is_what_one_shell_argument_holds(with_tasks):
    for text in TEXTS:
        (argument,) = quote_texts([f"prompt={text}"])
        assert OverridesParser.create().parse_override(argument).value() == text


@pytest.mark.slow
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
    assert wrap_settings_of_swept_groups(arguments.split()) == taken.split()
