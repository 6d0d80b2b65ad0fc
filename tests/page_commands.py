"""Finds the commands in the code blocks of README.md and docs/, and makes them small to run."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN, SWEEP = "outputs/2026-01-31/12-00-00", "multirun/2026-01-31/12-00-00"
BEGUN_RUN, BEGUN_SWEEP = "outputs/begun", "multirun/begun"
# Where a page has a value, these take its place, as many as it sweeps over. What follows below is
# given in any case.
SMALL = {
    "loss.l1": ("1e-3", "1e-2"),
    "model.features": ("80", "72"),
    "model.k": ("4", "6"),
    "loss.target_l0": ("8", "6"),
    "layer.index": ("1", "0"),
    "callbacks.resample.every": ("128", "256"),
    "sweep.seeds": ("2",),
    "hydra.sweeper.n_trials": ("2",),
    "hydra.sweeper.n_jobs": ("2",),
    "trainer.devices": ("1",),  # tests/test_devices.py has several
}
# Values of one setting in a sweep, and jobs of a sweep; but a choice of presets is taken whole,
# unless there are controls.
MOST, MOST_JOBS = 2, 4
SMALL_RUN = {
    "trainer.tokens": "256",
    "trainer.batch": "64",
    "trainer.accelerator": "cpu",
    "trainer.log_every": "4",
    "trainer.checkpoint_every": "256",
    "eval.every": "256",
    "eval.tokens": "120",
    "data.pool": "256",
    "model.features": "80",
}
SMALL_LLM = {
    "llm.name": "tiny",
    "llm.device": "cpu",
    "llm.dtype": "float32",
    "llm.batch": "4",
    "layer.index": "1",
    "data.context": "16",
    "eval.loss_tokens": "60",
}
SMALL_WORLD = {"data.concepts": "64", "data.dim": "16", "data.l0": "4"}
# Data sets of the hub are read from a folder.
SMALL_HUB = {"data.name": "hub", "data.streaming": "false"}
HUB = {  # what else each preset needs
    "hub": {"data.held_out_documents": "20"},
    "openwebtext": {"data.held_out_documents": "20"},
    "pile": {},
    "tinystories": {},
}
# How analyze.py's tasks are made small: "" is the overview.
READ = {"tokens": "1100"}
SMALL_TASK = {
    "": READ,
    "overview": READ,
    "features": READ,
    "theory": READ,
    "probe": READ,
    "probing": {"sets": "all", "sets_folder": "sets", "splits": "1"},
    "text": READ,
    "evaluate": {},
    "lens": {"contexts": "2"},
    "steer": {"tokens": "5"},
    "explain": READ | {"count": "2", "scored": "8", "examples": "8"},
    "sweep": {},
    "export": {},
    "publish": {},
}


class Command(NamedTuple):
    """A command of a page."""

    page: str
    script: str
    """train.py, analyze.py, or a path below benchmarks/."""
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The id of the command's test."""
        return f"{self.page}: {self.script} {' '.join(self.arguments)}"

    def setting(self, name: str) -> str | None:
        """The value that the command gives a setting (the last one); None if it gives none."""
        return dict(a.split("=", 1) for a in self.arguments if "=" in a).get(name)


def page_commands() -> list[Command]:
    """Every `python <script>.py ...` or torchrun in a code block of a page, once for each page."""
    found = {}
    for page in PAGES:
        for line in code_lines(page.read_text("utf8")):
            if re.search(r"(python|torchrun) .*\.py", line):
                found |= dict.fromkeys(read_commands(page.name, line))
    return list(found)


def code_lines(text: str) -> list[str]:
    """Lines of code blocks, indented or fenced; a line that ends with a backslash goes on."""
    lines, fenced = [], None
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = None if fenced else line.strip()
        elif fenced not in (None, "```python") or (not fenced and line.startswith("    ")):
            lines.append(line.strip())
    return lines


def read_commands(page: str, line: str) -> list[Command]:
    """The commands in one line; also one that is an argument of another (sbatch --wrap "...")."""
    words = shlex.split(line.replace("`", ""), comments=True)
    for i, word in enumerate(words):
        before = [w for w in words[:i] if not w.startswith("-")]
        if word.endswith(".py") and before and before[-1] in ("python", "torchrun"):
            end = next((j for j, w in enumerate(words) if j > i and w in "|>&&;"), len(words))
            return [Command(page, word, tuple(words[i + 1 : end]))]
    return [c for word in words if "python " in word for c in read_commands(page, word)]


def small_arguments(command: Command) -> list[str]:
    """The arguments of a command on tiny runs, a tiny LLM and tiny text."""
    if "--help" in command.arguments:
        return [*command.arguments]
    make = small_training if command.script == "train.py" else small_analysis
    return make(command)


def small_training(command: Command) -> list[str]:
    if resumed := command.setting("resume"):
        folder = BEGUN_SWEEP if resumed.startswith("multirun") else BEGUN_RUN
        return replaced(command.arguments, {"resume": folder}, sweep=False)
    data = command.setting("data") or "shakespeare"
    if command.setting("experiment"):
        data = "tinystories"
    if data == "activations":
        given = SMALL_RUN
    elif data == "synthetic":
        given = SMALL_RUN | SMALL_WORLD
    else:
        given = SMALL_RUN | SMALL_LLM | (SMALL_HUB | HUB[data] if data in HUB else {})
    if command.setting("data.cache"):
        given |= {"data.cache_folder": "cache"}
    if start := command.setting("model.start"):
        given |= {"model.start": f"null,{RUN}" if start.startswith("null,") else RUN}
    if command.setting("hydra/sweeper"):
        given |= {"hydra.sweeper.n_trials": "2", "hydra.sweeper.n_jobs": "2"}
    return replaced(command.arguments, given, "-m" in command.arguments)


def small_analysis(command: Command) -> list[str]:
    task = command.setting("task") or ""
    given = SMALL_TASK[command.setting("suite") or task] | {
        "run": SWEEP if task == "sweep" else RUN
    }
    if feature := command.setting("feature"):
        given["feature"] = feature if feature.startswith("[") else "3"
    if command.setting("control"):
        given["control"] = RUN
    if command.setting("llm"):
        given |= {"llm": "hf"} | SMALL_LLM
        del given["eval.loss_tokens"]
    return replaced(command.arguments, given, sweep=False)


def replaced(arguments: tuple[str, ...], given: dict[str, str], sweep: bool) -> list[str]:
    """The arguments with the values of `given` in place of their own, and the rest of `given`."""
    made, left, jobs = [], dict(given), 1
    controls = "sweep.controls=true" in arguments
    for argument in arguments:
        name, equals, value = argument.partition("=")
        left.pop(name, None)
        listed = re.search(r"[\[(]", value)  # a list, or an interval to search in
        values = value.split(",") if sweep and not listed else [value]
        small = None if listed else SMALL.get(name) or ((given[name],) if name in given else None)
        if "." in name or controls:
            values = (small or values)[: min(len(values), MOST, MOST_JOBS // jobs)]
        elif small:
            values = small[:1]
        jobs = min(jobs * len(values), MOST_JOBS)
        made.append(f"{name}={','.join(values)}" if equals else argument)
    return made + [f"{name}={value}" for name, value in left.items()]
