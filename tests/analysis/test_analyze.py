"""`analyze.py` in a process of its own, as a person runs it, and what it leaves on disk."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pyarrow.parquet
import pytest
from forked import run_script, start_script
from planted import FEATURE, save_planted
from tiny_run import write_text

import sae_lightning

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# As the README has it.
EXAMPLE = """
from sae_lightning import annotate, lens, open_run, steer, survey

subject, text = open_run("outputs/2026-01-31/12-00-00")  # SAE and LLM; training and held-out text
features = survey(subject, text.train, tokens=20_000).features
vocabulary = features.vocabulary  # token id -> text

# the feature that a set of tokens predicts best
best = features.token_sets.score.nan_to_num(0).argmax().item()
token_set = features.token_sets.tokens[best]
print(f"feature {best} fires on", [vocabulary[t] for t in token_set if t >= 0])
for example in features.top.tokens[best, :3]:
    print("".join(vocabulary[t] for t in example if t >= 0))

# tokens that it makes more likely, measured in excerpts of the text
effect = lens(subject, text=text.train, features=[best]).effect
print("it promotes", [vocabulary[t] for t in effect.promoted[best]])
for token in annotate(subject, "My lord, the king is dead"):
    print(token.text, token.features[:3], token.strengths[:3])
for continuation in steer(subject, best, [4, 8], "There once was a cat").steered:
    print(continuation.strength, continuation.text)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with text and an SAE in a folder whose name has to be quoted."""
    folder = tmp_path_factory.mktemp("here")
    _, sae = save_planted(folder)
    sae.rename(folder / "my sae, l1=0.1")
    (folder / "text").mkdir()
    write_text(folder / "text")
    return folder


def arguments(*more: str) -> list[str]:
    text = ["data=text", "data.path=text", "data.held_out=0.34"]
    return ["analyze.py", "run=my sae, l1=0.1", *text, *more]


def analyzed(here: Path, *more: str) -> str:
    """What it printed."""
    done = run_script(*arguments(*more), cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_overview_says_where_it_is_and_is_there(here):
    said = analyzed(here, "tokens=1500")
    page, numbers = (here / path for path in re.findall(r"  [a-z ]+: (my sae.*)", said)[-2:])
    assert (page.name, numbers.name) == ("index.html", "overview.json")
    assert {file.name for file in page.parent.iterdir()} == {
        *("index.html", "overview.json", "features.parquet", "neurons.parquet")
    }
    assert re.search(r"<title>llm, resid\.1: 32 relu features</title>", page.read_text())
    beside = re.findall('<a href="([^#"]+)">', page.read_text())
    assert beside == ["features.parquet", "neurons.parquet", "overview.json"]
    found = json.loads(numbers.read_text(), parse_constant=pytest.fail)
    assert found["features"]["features"] == 32
    rows = pyarrow.parquet.read_table(page.with_name("features.parquet")).to_pylist()
    assert {" wizards", " potion"} == set(rows[FEATURE]["tokens"])
    results = said[said.index("\nFeatures\n") : said.index("  open in a browser")]
    assert max(map(len, results.splitlines())) <= 80


def test_requests_to_an_endpoint_are_not_told_one_by_one(here):
    from chat_server import ChatServer, oracle

    with ChatServer(oracle) as server:
        model = [f"endpoint={server.url}", "explainer=small"]
        said = analyzed(here, "task=explain", "tokens=1500", f"feature={FEATURE}", *model)
        assert len(server.requests) > 5
    assert "HTTP" not in said
    assert f"{FEATURE}: the word " in said


def test_links_that_a_stranger_planted_overwrite_nothing(here, tmp_path):
    folder, victim = here / "my sae, l1=0.1", tmp_path / "victim"
    results, shelved = folder / "analysis", tmp_path / "shelved"
    victim.write_text("mine")
    if results.exists():
        results.rename(shelved)
    results.mkdir()
    names = ["evaluate.html", "evaluate.json"]
    for name in (*names, *(f".{name}.tmp" for name in names)):  # the latter is of version 0.1.0
        (results / name).symlink_to(victim)
    analyzed(here, "task=evaluate")
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(results)) == names
    assert not any(file.is_symlink() for file in results.iterdir())

    shutil.rmtree(results)
    results.symlink_to(tmp_path)
    done = run_script(*arguments("task=evaluate"), cwd=here)
    results.unlink()
    if shelved.exists():
        shelved.rename(results)
    assert done.returncode == 1
    assert re.fullmatch(r"error: my sae, l1=0\.1/analysis is a symbolic link, .*\n", done.stderr)


def test_the_key_of_an_endpoint_goes_nowhere_else_and_comes_back_nowhere(here, tmp_path):
    """The server quotes it in every answer, and what is shown and kept is searched for it."""
    from chat_server import ChatServer, oracle

    key = "sk-very-secret-123"
    given = ["task=explain", "tokens=1500", f"feature={FEATURE}", "explainer=small"]
    variables = {"OPENAI_API_KEY": key, "XDG_CACHE_HOME": str(tmp_path)}

    def explained(endpoint: str, **more: str):
        typed = arguments(*given, f"endpoint={endpoint}", "hydra.verbose=true")
        return run_script(*typed, cwd=here, **variables, **more)

    with ChatServer(lambda question: f"{oracle(question)} ({key}, {key[:7]}***)") as server:
        # whatever was sent to a host outside would come by this proxy
        refused = explained("HTTP://some.host/v1", http_proxy=server.url)
        assert (refused.returncode, server.requests) == (1, [])
        said = "error: endpoint=HTTP://some.host/v1: would get the key unencrypted; use https"
        assert refused.stderr.startswith(said)
        assert refused.stderr.count("\n") == 1
        done = explained(server.url)
        assert done.returncode == 0
        assert set(server.keys) == {f"Bearer {key}"}
    assert f"{FEATURE}: the word " in done.stdout
    kept = [file for folder in (here, tmp_path) for file in folder.rglob("*.*") if file.is_file()]
    assert {"explain.html", "explain.json"} <= {file.name for file in kept}
    assert sum(file.is_relative_to(tmp_path) for file in kept) > 5, "the answers"
    everything = [done.stdout, done.stderr, *(file.read_bytes().decode("latin1") for file in kept)]
    assert not any(part in text for part in (key, key[:7]) for text in everything)


def test_ctrl_c_ends_it_at_once_and_leaves_nothing(here):
    before = sorted(here.rglob("*"))
    typed = ["run=my sae, l1=0.1", "task=features", "tokens=100_000_000"]
    process = start_script("analyze.py", *typed, cwd=here)
    process.wait_for("tokenising the text")
    os.kill(process.pid, signal.SIGINT)
    ended = process.wait()
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert sorted(here.rglob("*")) == before


def test_the_example_finds_and_steers_the_planted_feature(here, tmp_path):
    script = EXAMPLE.replace(
        'open_run("outputs/2026-01-31/12-00-00")',
        f"open_run({str(here / 'my sae, l1=0.1')!r}, data=LocalConfig(path='text', context=16))",
    )
    script = script.replace("import annotate", "import LocalConfig, annotate").replace(
        '"There once was a cat")', '"the lazy dog", tokens=6)'
    )
    (tmp_path / "look.py").write_text(script)
    done = run_script(str(tmp_path / "look.py"), cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"feature {FEATURE} fires on" in done.stdout
    assert "it promotes [' fox'" in done.stdout
    assert re.search(r"^8 the .*fox .*fox$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", sae_lightning.__all__)
def test_every_name_of_the_package_is_there_and_has_a_docstring(name):
    assert getattr(sae_lightning, name).__doc__
