"""Parts of users' own are imported where they are typed or installed, and nowhere else."""

import os
import re
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from sae_lightning.errors import UserError
from sae_lightning.runs.config import find_conf_folder, list_presets
from sae_lightning.runs.jobs import CONFIG_FILE, format_config, make_job, read_job
from sae_lightning.runs.plugins import import_plugins, load_plugins
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.stream import SOURCES

NEW = """
from dataclasses import dataclass
from sae_lightning.sae import ARCHITECTURES, Architecture
from sae_lightning.sae.topk import TopK, TopKConfig
from sae_lightning.sae.objective import AuxKLoss

@dataclass(slots=True, kw_only=True)
class Own(TopKConfig):
    k: int = 7

@dataclass(slots=True, kw_only=True)
class OwnLoss(AuxKLoss):
    pass

ARCHITECTURES["mine"] = Architecture(Own, TopK, OwnLoss)
"""
NEW_DATA = """
from dataclasses import dataclass
from sae_lightning.stream import SOURCES
from sae_lightning.stream.synthetic import SyntheticConfig, SyntheticSource

@dataclass(slots=True, kw_only=True)
class PuzzlesConfig(SyntheticConfig):
    kind: str = "puzzles"

class PuzzlesSource(SyntheticSource):
    settings = PuzzlesConfig
    metrics = frozenset({"solved"})

SOURCES["puzzles"] = PuzzlesSource
"""


@pytest.fixture(autouse=True)
def as_before(tmp_path, monkeypatch):
    """Work in a new folder; tables, modules, paths and Hydra's options are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    modules, tables = set(sys.modules), [dict(ARCHITECTURES), dict(SOURCES)]
    yield
    for name in set(sys.modules) - modules:
        if "site-packages" not in str(getattr(sys.modules[name], "__file__", "site-packages")):
            del sys.modules[name]
    for table, before in zip((ARCHITECTURES, SOURCES), tables, strict=True):
        table.clear()
        table.update(before)
    for group in ("model", "loss", "data"):
        ConfigStore.instance().repo.pop(group, None)
        ConfigStore.instance().repo["schema"].pop(group, None)
    register_schemas()


def compose_config(arguments: list[str]):
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        return make_job(compose("config", arguments), Path("run"), arguments)


@pytest.mark.parametrize(
    "typed", ["+plugins=[own_part]", "plugins=own_part", "plugins=[ 'own_part' ]"]
)
def test_an_architecture_of_a_module_here_is_an_option(tmp_path, typed):
    (tmp_path / "own_part.py").write_text(NEW)
    arguments = load_plugins(["model=mine", typed, "model.features=64"])
    assert arguments == ["model=mine", "plugins=[own_part]", "model.features=64"]
    job = compose_config([*arguments, "seed=3"])
    assert (job.config.model.k, job.config.model.name, job.config.model.seed) == (7, "mine", 3)
    assert type(job.config.loss) is ARCHITECTURES["mine"].loss
    assert re.search(r"  model .*mine.*\n", list_presets())
    assert job.trust_overrides == {"plugins": "[own_part]"}
    assert str(tmp_path) in os.environ["PYTHONPATH"], "for the processes that a run starts"


def test_a_file_is_recorded_by_its_full_path(tmp_path):
    (tmp_path / "my parts").mkdir()
    file = tmp_path / "my parts" / "own_file.py"
    file.write_text(NEW)
    arguments = load_plugins(["plugins=[my parts/own_file.py]", "model=mine"])
    assert compose_config(arguments).config.plugins == [str(file)]


def test_several_plugins_are_imported_in_order(tmp_path):
    (tmp_path / "own_a.py").write_text("")
    (tmp_path / "own_b.py").write_text("import sys; assert 'own_a' in sys.modules")
    assert load_plugins(["plugins=own_a,own_b"]) == ["plugins=[own_a,own_b]"]


def test_without_plugins_nothing_changes():
    groups = set(ConfigStore.instance().repo)
    assert load_plugins(["seed=1", "-m"]) == ["seed=1", "-m"]
    assert set(ConfigStore.instance().repo) == groups


@pytest.mark.slow
def test_the_metrics_of_an_own_kind_of_data_can_be_the_objective(tmp_path):
    (tmp_path / "own_data.py").write_text(NEW_DATA)
    typed = load_plugins(
        ["plugins=[own_data]", "llm=none", "data=puzzles", "sweep.objective=-solved"]
    )
    assert compose_config(typed).config.sweep.objective == "-solved"
    with pytest.raises(UserError, match=r"objective=solved is not measured on text: choose from"):
        compose_config(load_plugins(["sweep.objective=solved"]))


def test_a_preset_of_the_users_comes_before_the_option(tmp_path):
    (tmp_path / "own_preset.py").write_text(NEW)
    (tmp_path / "presets" / "model").mkdir(parents=True)
    (tmp_path / "presets" / "model" / "mine.yaml").write_text("k: 5")
    load_plugins(["plugins=[own_preset]"])
    assert "mine.yaml" in ConfigStore.instance().repo["model"]
    load_plugins(["--config-dir", "presets", "plugins=[own_preset]"])
    assert "mine.yaml" not in ConfigStore.instance().repo["model"]
    assert "mine.yaml" in ConfigStore.instance().repo["loss"]


@pytest.mark.parametrize(
    ("text", "typed", "line"),
    [
        (
            None,
            "own_nope",
            r"plugins=\[own_nope\]: no module of this name; give one that Python .*",
        ),
        (None, "own.nope", r"plugins=\[own\.nope\]: no module of this name; .*"),
        (None, "own_nope.py", r"plugins=\[.*/own_nope\.py\]: no such file"),
        (
            "import nope",
            "own_bad",
            r"plugins=\[own_bad\]: ModuleNotFoundError: .*, line 1\)",
        ),
        ("\n1 / 0", "own_bad", r"plugins=\[own_bad\]: ZeroDivisionError: .*own_bad\.py, line 2\)"),
        ("a b", "own_bad", r"plugins=\[own_bad\]: SyntaxError: .*"),
        (
            "from sae_lightning.sae import ARCHITECTURES as A; A['topk'] = A['relu']",
            "own_bad",
            r"plugins=\[own_bad\]: the architecture topk is there already; choose another name",
        ),
        (
            "from sae_lightning.stream import SOURCES as S; S['plays'] = S['hub']",
            "own_bad.py",
            r"plugins=\[.*own_bad\.py\]: the kind of data plays is there already; .*",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_told_in_one_line(tmp_path, text, typed, line):
    if text is not None:
        (tmp_path / "own_bad.py").write_text(text)
    before = dict(ARCHITECTURES)
    with pytest.raises(UserError) as error:
        load_plugins([f"plugins=[{typed}]"])
    assert re.fullmatch(line, str(error.value)), error.value
    assert before == ARCHITECTURES


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match=r"Python finds another module json, .*; rename yours$"):
        load_plugins(["plugins=[json.py]"])


def test_an_installed_plugin_needs_not_be_typed(tmp_path):
    (tmp_path / "own_installed.py").write_text(NEW)
    info = tmp_path / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sae_lightning.plugins]\nmine = own_installed\n")
    sys.path.append(str(tmp_path))
    import_plugins([])
    assert "mine" in ARCHITECTURES


@pytest.mark.slow
def test_a_run_folder_does_not_import_what_it_names(tmp_path):
    (tmp_path / "own_run.py").write_text(NEW)
    folder = tmp_path / "run"
    folder.mkdir()
    job = compose_config(load_plugins(["plugins=[own_run]", "model=mine"]))
    (folder / CONFIG_FILE).write_text(format_config(job))
    assert read_job(folder).config.model.name == "mine"
    del sys.modules["own_run"]
    with pytest.raises(UserError, match=r"plugins=\[own_run\]: read that code first, then allow"):
        read_job(folder)
    assert "own_run" not in sys.modules
