"""A wheel holds all that the commands need, and they run where no clone is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sae_lightning.runs.config import find_conf_folder
from sae_lightning.terminal import format_command, name_program

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-index", "--no-deps")
SMALL = ("data=synthetic", "trainer=smoke", "trainer.accelerator=cpu")


def run(command: list[str], **options) -> str:
    """What a command prints; fails if it does."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built in a copy, because setuptools leaves files where it builds."""
    base = tmp_path_factory.mktemp("wheel")
    parts = ("sae_lightning", "hydra_plugins", "conf")
    for part in parts:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, base / "tree" / part, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, base / "tree" / name)
    run([*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", base, base / "tree"])
    (built,) = base.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel):
    """The folder that the wheel is installed into."""
    folder = wheel.with_name("site")
    run([*PIP, "install", *OFFLINE, "--target", folder, wheel])
    return folder


@pytest.fixture
def command(site, tmp_path):
    """command(name, *arguments): a console script in an empty folder. It sees the wheel and the
    packages it depends on, but not the clone, which .venv holds as an editable install."""
    paths = [str(site), sysconfig.get_path("purelib")]
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def command(name: str, *arguments: str) -> str:
        return run([sys._base_executable, site / "bin" / name, *arguments], cwd=tmp_path, env=env)

    return command


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {
        str(file.relative_to(ROOT))
        for part in ("sae_lightning", "hydra_plugins", "conf")
        for file in (ROOT / part).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    files = {f"sae_lightning/{name}" if name.startswith("conf/") else name for name in files}
    assert files <= held
    assert {name for name in held - files if ".dist-info/" not in name} == set()


@pytest.mark.slow
def test_the_commands_of_a_wheel_train_and_analyse_in_any_folder(command, tmp_path):
    printed = command("sae-train", "-m", *SMALL, "loss.l1=1e-3", "hydra.sweep.dir=sweep")
    assert "1 job on 1 pass" in printed, "the launcher of hydra_plugins is found"
    printed = command("sae-analyze", "run=sweep/0")
    assert "open in a browser: sweep/0/analysis/index.html" in printed
    page = (tmp_path / "sweep" / "0" / "analysis" / "index.html").read_text()
    assert "sae-analyze run=" in page
    assert "analyze.py" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_in_a_clone_the_presets_lie_at_the_top():
    assert find_conf_folder() == str(ROOT / "conf")


def test_a_command_is_printed_as_it_was_typed(monkeypatch):
    assert format_command("train.py", "-m", resume="a b") == "python train.py -m 'resume=a b'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sae-train", "seed=1"])
    assert format_command("analyze.py", run="a") == "sae-analyze run=a"
    assert name_program("train.py") == "sae-train"


def test_no_help_says_python_where_the_command_has_another_name():
    for page in ("config", "analyze"):
        text = (ROOT / "conf" / f"{page}.yaml").read_text("utf8")
        template = text.partition("template: |")[2]
        assert "${program:" in template
        assert not re.search(r"(?<!program:)(train|analyze)\.py", template)
