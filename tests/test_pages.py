"""What the pages say can be done: every command runs, every link leads somewhere."""

import importlib
import json
import logging
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import ChatServer, oracle
from hub_server import TOKEN, HubServer, connect
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from page_commands import (
    BEGUN_RUN,
    BEGUN_SWEEP,
    PAGES,
    ROOT,
    RUN,
    SWEEP,
    Command,
    code_lines,
    page_commands,
    read_commands,
    small_arguments,
)
from safetensors.torch import save_file
from tiny_llm import TEXT, save_tiny
from tiny_run import write_text

from sae_lightning.runs.arguments import allow_new_dict_keys
from sae_lightning.runs.config import find_conf_folder
from sae_lightning.runs.schemas import register_schemas

# Composed and checked, but not run.
COMPOSED = {
    "logger=wandb": "needs a login; tests/training/test_loggers.py runs it offline",
    "logger=[csv,wandb]": "the same",
    "logger=mlflow": "tests/training/test_loggers.py runs it, which takes seconds",
    "hydra/launcher=submitit_slurm": "needs a Slurm cluster",
    "hydra/launcher=submitit_local": "starts processes; tests/runs/test_sweepers.py does that",
    "sweep.objective=probing": "needs the package sae-probes",
    "hydra/launcher=ray": "not compatible with constraints.txt",
    "llm.load={device_map:auto,max_memory:{0:20GiB,cpu:60GiB},offload_folder:/scratch/off}": "GPU",
    "llm.load.quantization_config={load_in_8bit:true}": "needs bitsandbytes",
    "llm.load.quantization_config={load_in_4bit:true,bnb_4bit_quant_type:nf4}": "the same",
}
# Code and commands of one page belong together: tests/commands/test_extending.py runs them.
TOGETHER = "extending.md"
ALONE = [c for c in page_commands() if c.page != TOGETHER]
COMMANDS = [c for c in ALONE if c.script in ("train.py", "analyze.py")]
BENCHMARKS = [c for c in ALONE if c not in COMMANDS]
COMPOSABLE = [c for c in COMMANDS if {*c.arguments} & COMPOSED.keys()]
# The same command is run once, whatever page it is on.
RUNNABLE = {(c.script, *small_arguments(c)): c for c in COMMANDS if c not in COMPOSABLE}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Deprecated API features:DeprecationWarning"),  # Optuna's
    pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated"),
]


def parameters(commands: list[Command]) -> list:
    return [pytest.param(c, id=c.name) for c in commands]


def write_plays(folder: Path) -> list[Path]:
    """Ten plays by genre, as the package has them; three have the names of those held out."""
    names = ["hamlet", "the-tempest", "henry-v", *(f"play-{n}" for n in range(9))]
    text = (folder / "text" / "a.txt").read_text()
    for n, name in enumerate(names):
        genre = folder / "plays" / ("comedies", "tragedies")[n % 2]
        genre.mkdir(parents=True, exist_ok=True)
        speeches = [f"**{'AB'[i % 2]}**  \n{text[i * 60 : i * 60 + 200]}\n\n" for i in range(30)]
        (genre / f"{name}.md").write_text("".join(speeches))
    return sorted((folder / "plays").glob("*/*.md"))


def write_activations(folder: Path) -> None:
    """One matrix; one whose name has to be given; and sites by name."""
    (folder / "acts").mkdir()
    x = torch.randn(600, 12)
    np.save(folder / "embeddings.npy", x.numpy())
    save_file({"cls": x, "patches": x + 1}, folder / "vit.safetensors")
    for n, name in enumerate(("resid.0", "resid.1", "mlp_in.1", "mlp.1")):
        save_file({name: x + n}, folder / "acts" / f"{name}.safetensors")


def write_begun(run: Path, begun: Path) -> None:
    """A run or a sweep as if it had been killed before its first checkpoint."""
    kept = [*run.rglob("config.yaml"), *run.rglob("multirun.yaml")]
    for file in kept:
        copy = begun / file.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace(str(run), str(begun)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of the commands, with a tiny LLM and texts."""
    folder = tmp_path_factory.mktemp("pages")
    save_tiny("llama", str(folder / "tiny"))
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    (folder / "tiny" / "chat_template.jinja").write_text(template)
    chat = [{"role": role, "content": TEXT} for role in ("user", "assistant")]
    (folder / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 20))
    for name in ("text", "books", "corpus/books", "corpus/code"):
        (folder / name).mkdir(parents=True)
        write_text(folder / name)
    (folder / "notes.txt").write_text(TEXT)
    (folder / "hub").mkdir()
    write_activations(folder)
    (folder / "sets").mkdir()
    pairs = [f"word {n},{n % 2}\n" for n in range(80)]
    for name in ("96_spam_is", "92_glue_sst2"):
        (folder / "sets" / f"{name}.csv").write_text("prompt,target\n" + "".join(pairs))
    words = TEXT.split()
    rows = [json.dumps({"text": " ".join(words[n % 7 :] * 2)}) for n in range(60)]
    for split in ("train", "validation"):
        (folder / "hub" / f"{split}.jsonl").write_text("\n".join(rows))
    (folder / "my" / "model").mkdir(parents=True)
    (folder / "my" / "model" / "mine.yaml").write_text("defaults: [topk, _self_]\nk: 7\n")
    return folder


@pytest.fixture(scope="module")
def plays(folder):
    return write_plays(folder)


@pytest.fixture
def run(folder, plays, monkeypatch):
    """run(script, arguments): `python script arguments` in this process and that folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "user-cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody's")
    for module in ("stream.plays", "analysis.probing.pieces"):
        monkeypatch.setattr(f"sae_lightning.{module}.find_plays", lambda: plays)
    monkeypatch.syspath_prepend(str(ROOT))  # hydra_plugins
    handlers, interrupt = logging.root.handlers[:], signal.getsignal(signal.SIGINT)

    def run(script: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            assert ended.code in (0, None), ended.code
        finally:
            ConfigStore.instance().repo.pop("task", None)
            logging.root.handlers[:] = handlers
            signal.signal(signal.SIGINT, interrupt)

    return run


@pytest.fixture
def trained(folder, run):
    """The folders that pages name as examples: a run, a sweep, and both as if killed."""
    if not (folder / RUN).exists():
        run("train.py", [*small_arguments(Command("", "train.py", ())), f"hydra.run.dir={RUN}"])
        sweep = small_arguments(Command("", "train.py", ("-m", "loss.l1=1e-3,1e-2")))
        run("train.py", [*sweep, f"hydra.sweep.dir={SWEEP}"])
    for done, begun in ((RUN, BEGUN_RUN), (SWEEP, BEGUN_SWEEP)):
        shutil.rmtree(folder / begun, ignore_errors=True)
        write_begun(folder / done, folder / begun)


@pytest.mark.slow
@pytest.mark.parametrize("command", parameters(list(RUNNABLE.values())))
def test_a_command_of_a_page_does_what_it_says(
    command, run, trained, capsys, monkeypatch, tmp_path
):
    arguments = small_arguments(command)
    with ChatServer(answer) as server, HubServer() as hub:
        if command.setting("task") == "publish":
            connect(monkeypatch, hub.url, tmp_path, TOKEN)
        if command.setting("endpoint"):
            given = {"endpoint": server.url, "explainer": "small"}
            arguments = [
                f"{n}={given.get(n, v)}" for n, _, v in (a.partition("=") for a in arguments)
            ]
        run(command.script, arguments)
    output = capsys.readouterr()
    assert output.err == ""
    assert "failed" not in output.out
    if "--help" not in arguments:
        assert re.search(r"(analyze\.py run=|: .*\.(html|json|csv)|written for)", output.out), (
            output.out
        )


def answer(question: str) -> str:
    """Of a model that explains every feature by the same word."""
    return oracle(question) if "the word " in question else "Explanation: the word fox"


@pytest.mark.slow
@pytest.mark.parametrize("command", parameters(COMPOSABLE))
def test_a_command_for_elsewhere_is_composed(command):
    register_schemas()
    parse = OverridesParser.create().parse_override
    typed = allow_new_dict_keys([*command.arguments])
    jobs = [first_value(parse(a)) for a in typed if not a.startswith("-")]
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        OmegaConf.to_object(compose("config", jobs))
        compose("config", jobs, return_hydra_config=True)


def first_value(override) -> str:
    """The override of the first job of a sweep."""
    if override.is_sweep_override():
        return f"{override.key_or_group}={next(override.sweep_string_iterator())}"
    return override.input_line


@pytest.mark.parametrize("command", parameters(BENCHMARKS))
def test_a_benchmark_of_a_page_is_there_and_tells_its_options(command):
    """They measure for minutes, so they are not run; tests/test_benchmarks.py has their sums."""
    text = (ROOT / command.script).read_text("utf8")
    usage = text.split('"""')[1]
    assert f"python {command.script}" in usage
    for argument in command.arguments:
        assert argument.partition("=")[0] in usage


BLOCKS = {
    f"{page.name}-{n}": block
    for page in PAGES
    if page.name not in ("README.md", TOGETHER)  # tests/analysis/test_analyze.py has README's
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf8"), re.DOTALL))
}


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.filterwarnings("ignore")  # other tools'
def test_python_of_a_page_runs(block, trained):
    exec(BLOCKS[block], {"activations": torch.randn(8, 24)})


@pytest.mark.slow
def test_settings_md_is_what_the_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    written = importlib.import_module("write_settings").format_page()
    page = (ROOT / "docs" / "settings.md").read_text("utf8")
    assert written == page, "python docs/write_settings.py writes it anew"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text("utf8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("name", "most"), [("README.md", 140), ("ARCHITECTURE.md", 170)])
def test_a_page_ends(name, most):
    assert len((ROOT / name).read_text("utf8").splitlines()) <= most


def test_commands_are_found_wherever_they_stand():
    text = """
Text python train.py a=0.

    python train.py a=1   # comment
    $ CUDA_VISIBLE_DEVICES=0 python analyze.py b='x y' | head
    sbatch --wrap "python train.py -m c=1,2"
    python train.py d=1 \\
        e=2
    torchrun --nproc-per-node=8 train.py h=1

```python
import train  # python train.py f=1
```
```
python train.py g=1
```
"""
    found = [c for line in code_lines(text) for c in read_commands("", line)]
    assert [(c.script, *c.arguments) for c in found] == [
        ("train.py", "a=1"),
        ("analyze.py", "b=x y"),
        ("train.py", "-m", "c=1,2"),
        ("train.py", "d=1", "e=2"),
        ("train.py", "h=1"),
        ("train.py", "g=1"),
    ]
