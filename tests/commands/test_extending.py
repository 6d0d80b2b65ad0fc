"""docs/extending.md: its files work as plugins, with its commands."""

import re
import runpy
import sys
import warnings

import pytest
from forked import Forked
from page_commands import ROOT, page_commands
from tiny_llm import save_tiny

import sae_lightning

PAGE = (ROOT / "docs" / "extending.md").read_text("utf8")
FILES = dict(re.findall(r"`(\w+\.py)`:.*?```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [c for c in page_commands() if c.page == "extending.md"]
SMALL = (
    *("trainer=smoke", "trainer.tokens=512", "trainer.batch=64", "trainer.accelerator=cpu"),
    *("eval.tokens=128", "eval.every=512", "model.features=48", "data.pool=256"),
)
WORLD = ("data=synthetic", "data.concepts=32", "data.dim=16", "data.l0=3")
LLM = ("llm=hf", "llm.name=tiny", "layer.index=1", "data.context=16", "eval.loss_tokens=0")


@pytest.fixture
def folder(tmp_path):
    """A folder with the page's files, its preset, a text and a tiny LLM."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "presets" / "model").mkdir(parents=True)
    preset = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    (tmp_path / "presets" / "model" / "saturating.yaml").write_text(preset)
    (tmp_path / "verses.txt").write_text("The fox sees the king.\nA cat is on the hill.\n" * 200)
    save_tiny("llama", str(tmp_path / "tiny"))
    return tmp_path


def run(folder, commands: list[list[str]]) -> list[str]:
    """What each command prints; how it ended, if not well, is its last line."""
    done = Forked(_run_commands, commands, cwd=folder).wait()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.split("$ ")[1:]


def _run_commands(commands: list[list[str]]) -> None:
    """Run commands one after another, as each would run in a process of its own."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    for script, *arguments in commands:
        sys.stdout.write(f"$ {script}\n")
        sys.argv = [str(ROOT / script), *arguments]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                sys.stdout.write(f"ended with {ended.code}\n")


def test_the_page_has_a_file_for_each_kind_of_part():
    assert list(FILES) == ["saturating.py", "verses.py", "biases.py"]
    assert [c.script for c in COMMANDS] == ["train.py"] * 4 + ["analyze.py"]
    assert len([line for line in FILES["saturating.py"].splitlines() if line.strip()]) <= 45


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder):
    one, sweep, help, verses, biases = ([c.script, *c.arguments] for c in COMMANDS)
    printed = run(
        folder,
        [
            [*one, *WORLD, *SMALL, "hydra.run.dir=one"],
            [*sweep, *WORLD, *SMALL, "hydra.sweep.dir=sweep"],
            help,
            ["train.py", "resume=one", "plugins=[saturating]"],
            [*verses, *LLM, *SMALL, "hydra.run.dir=verses"],
            ["train.py", "--config-dir", "presets", *one[1:3], *WORLD, *SMALL, "hydra.run.dir=two"],
            [biases[0], "plugins=[biases,saturating]", "run=one", *biases[3:]],
        ],
    )
    assert "analyze.py run=one 'plugins=[saturating]'" in printed[0], "as it can be pasted"
    assert "2 jobs on 1 pass" in printed[1]
    assert re.search(r"  model  .*saturating", printed[2])
    assert re.search(r"  loss  .*saturating", printed[2])
    assert "one is finished" in printed[3]
    assert "explained variance" in printed[4]
    assert len(re.findall(r"feature \d+: bias ", printed[6])) == 3
    assert not [text for text in printed if "ended with" in text]
    settings = [(folder / name / "config.yaml").read_text() for name in ("one", "two", "verses")]
    assert all("ceiling: 4.0" in text for text in settings[:2])
    assert "plugins:\n- verses\n" in settings[2]


@pytest.mark.slow
def test_ranks_import_plugins_before_they_read_what_they_train(folder):
    two = ["trainer.devices=2", "hydra.run.dir=two"]
    (folder / "elsewhere").mkdir()
    (folder / "saturating.py").rename(folder / "elsewhere" / "saturating.py")
    given = ["plugins=[elsewhere/saturating.py]", "model=saturating"]
    (printed,) = run(folder, [["train.py", *given, *WORLD, *SMALL, *two]])
    assert "explained variance" in printed
    with pytest.raises(sae_lightning.UserError, match="there is no architecture saturating here"):
        sae_lightning.load_sae(folder / "two")
