"""How fast are other tools at the same work, on the same machine, in the same hour?

Every tool trains from text to SAE with the same LLM, text, features, batch, context and number of
tokens, each run in its own process. The tools take turns, and every other round goes backwards, so
that a machine that slows down favours no tool. The clock runs from before the first
fill of the tool's buffer to the last update: loading, tokenising, evaluating and saving are not
counted. `peers/speed_*.py` say what "documented" and "tuned" mean for a tool.

    python benchmarks/speed.py                           # 2 rounds of ReLU and BatchTopK
    python benchmarks/speed.py peer_tokens=51200         # quicker: others' speed is constant
    python benchmarks/speed.py runs=topk:model.k=32 only=sae_lightning,sparsify rounds=1
    python benchmarks/speed.py gpu                       # GPT-2 small's shape, as in throughput.py
    python benchmarks/speed.py python=sparsify:/tmp/sparsify/bin/python
    python benchmarks/speed.py trainer.tokens=16384 model.features=512 data.pool=4096 rounds=1

`python` gives the Python interpreter of a tool's environment (or of several tools, separated by
commas); a tool that is not installed is left out. `peer_tokens` gives other tools fewer tokens.
`saelens.<option>=<JSON>` sets an option of SAELens' runner in its tuned variant. All else is as in
throughput.py, but with one LLM and without `sweep` and `profile`; logs and speed.json go to `out`
(outputs/speed).

ours is    our speed / the tool's speed in the same round: median and range over the rounds
"""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from command import make_jobs, run_command
from rich.table import Table
from throughput import Arguments, make_llm_overrides, read_arguments
from timing.child import Failed, call, make_name
from timing.models import truncate_llm
from transformers import AutoTokenizer

from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.llm.load import has_bf16, pick_device, read_llm_shape
from sae_lightning.llm.packaged import PACKAGED, dequantise
from sae_lightning.runs.config import Config
from sae_lightning.stream import open_text
from sae_lightning.stream.tokens import open_tokens
from sae_lightning.terminal import console, phase

OURS = "sae_lightning"
PEERS = ("saelens", "dictionary_learning", "sparsify")
OPTIONS = ("rounds", "peer_tokens", "only", "python", "out")
THROUGHPUT_ONLY = ("sweep", "profile")  # options of throughput.py that are refused here


class Contestant(NamedTuple):
    """A tool, variant and SAE, run once per round."""

    tool: str
    variant: str
    """documented or tuned; empty for ours."""
    architecture: str
    setting: str
    """Sparsity, as an override."""
    python: str = sys.executable

    @property
    def name(self) -> str:
        return make_name(self.tool, self.variant, self.architecture, self.setting)


def main(command_line: list[str]) -> None:
    """Run every tool in every round, and print the ratios."""
    options = dict(a.split("=", 1) for a in command_line if a.partition("=")[0] in OPTIONS)
    rest = [a for a in command_line if a.partition("=")[0] not in OPTIONS]
    runner_options = [
        a.removeprefix("saelens.").split("=", 1) for a in rest if a.startswith("saelens.")
    ]
    rest = [a for a in rest if not a.startswith("saelens.")]
    if stray := [a for a in rest if a.partition("=")[0] in THROUGHPUT_ONLY]:
        raise UserError(f"{stray[0]}: only throughput.py has this; leave it out")
    arguments = read_arguments([*rest, f"out={options.get('out', 'outputs/speed')}"])
    if len(arguments.models) > 1:
        raise UserError(
            f"models={','.join(arguments.models)}: tools are compared on one LLM; give one"
        )
    shutil.rmtree(arguments.out / "runs", ignore_errors=True)
    llm = make_llm_overrides(arguments.models[0], arguments)
    work = _prepare_work(arguments, llm, int(options.get("peer_tokens", 0)))
    work["options"] = {name: json.loads(value) for name, value in runner_options}
    contestants, tools = _find_contestants(arguments, options)
    results: list[dict[str, Any]] = []
    for number, contestant in enumerate(order_runs(contestants, int(options.get("rounds", 2)))):
        if result := _run(contestant, number, arguments, llm, work):
            results.append({"round": number // len(contestants), **result})
            write_json(
                arguments.out / "speed.json", {"tools": tools, "work": work, "runs": results}
            )
    _show(results, tools)
    console.print(f"the figures are in {arguments.out / 'speed.json'}")


def order_runs(contestants: Sequence[Contestant], rounds: int) -> list[Contestant]:
    """Order all runs by SAE within each round; every other round goes backwards."""
    forwards = sorted(contestants, key=lambda c: (c.architecture, c.setting))
    backwards = forwards[::-1]
    return [run for n in range(rounds) for run in (forwards if n % 2 == 0 else backwards)]


def _find_contestants(
    arguments: Arguments, options: dict[str, str]
) -> tuple[list[Contestant], dict[str, str]]:
    """Find our runs and the variants of the installed tools, and the tools' names with versions."""
    selection = options["only"].split(",") if "only" in options else [OURS, *PEERS]
    pythons = dict(pair.split(":", 1) for pair in options.get("python", "").split(",") if pair)
    contestants = [Contestant(OURS, "", *run) for run in arguments.runs if OURS in selection]
    tools = {OURS: OURS}
    for tool in (t for t in PEERS if t in selection):
        python = pythons.get(tool, sys.executable)
        try:
            with phase(f"looking for {tool}"):
                log = arguments.out / "logs" / f"{tool}.log"
                about = call(f"peers.speed_{tool}:describe_tool", {}, log, python)
        except Failed as error:
            console.print(f"{tool} is left out: {error}")
            continue
        tools[tool] = f"{about['name']} {about['version']}"
        contestants += [
            Contestant(tool, variant, architecture, setting, python)
            for architecture, setting in arguments.runs
            for variant in about["variants"]
            if architecture in about["architectures"]
        ]
    return contestants, tools


def _prepare_work(arguments: Arguments, llm: list[str], peer_tokens: int) -> dict[str, Any]:
    """Prepare what other tools are given: files and plain numbers."""
    config = make_jobs([llm], arguments.out / "runs")[0].config
    kind = pick_device(config.llm).type
    dtype = torch.bfloat16 if has_bf16(kind) else torch.float32
    source = dequantise(config.llm.name) if config.llm.name in PACKAGED else Path(config.llm.name)
    cut, module = truncate_llm(source, config.layer.index, dtype, arguments.out / "models")
    steps = min(
        config.trainer.steps, (peer_tokens or config.trainer.tokens) // config.trainer.batch
    )
    tokens = arguments.out / "tokens.pt"
    torch.save(_read_tokens(config, source, steps), tokens)
    return {
        "llm": str(source),
        "truncated": str(cut),
        "module": module,
        "block": config.layer.index,
        "d": read_llm_shape(config.llm).width,
        "tokens": str(tokens),
        "features": config.model.features,
        "batch": config.trainer.batch,
        "context": config.data.context,
        "llm_batch": config.llm.batch,
        "pool": config.data.pool,
        "steps": steps,
        "seed": config.seed,
        "device": kind,
        "bf16": dtype is torch.bfloat16,
    }


def _read_tokens(config: Config, source: Path, steps: int) -> torch.Tensor:
    """Read sequences [n, context] of the training text in the order of our runs: enough to train
    and to fill any tool's buffer and estimate its scale."""
    data, batch = config.data, config.trainer.batch
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = open_tokens(open_text(data), tokenizer, context=data.context, seed=config.seed)
    count = 1.1 * steps * batch + 2 * data.pool + 4 * batch
    return text.train.next(round(count / (data.context - 1))).tokens


def _run(
    contestant: Contestant, number: int, arguments: Arguments, llm: list[str], work: dict[str, Any]
) -> dict[str, Any] | None:
    """Run one tool once; if it fails, prints the reason and returns None."""
    tool, variant, architecture, setting, python = contestant
    log = arguments.out / "logs" / f"{number}-{contestant.name}.log"
    if tool == OURS:
        function = "timing.ours:measure"
        runs = [[f"model={architecture}", *llm, setting]]
        settings = {"runs": runs, "folder": str(arguments.out / "runs" / str(number))}
    else:
        function = f"peers.speed_{tool}:measure"
        value = float(setting.partition("=")[2])
        settings = {"architecture": architecture, "variant": variant, "setting": value}
        settings["work"] = work
    try:
        with phase(contestant.name):
            result = call(function, settings, log, python)
    except Failed as error:
        console.print(f"{contestant.name} failed: {error}")
        return None
    speed = result["tokens"] / result["seconds"]
    console.print(f"{contestant.name}: {speed:,.0f} tokens/s")
    about = {"tool": tool, "variant": variant, "architecture": architecture, "setting": setting}
    return about | result | {"tokens_per_second": speed}


class Row(NamedTuple):
    """A tool's variant with one SAE, over all rounds."""

    architecture: str
    setting: str
    tool: str
    variant: str
    speeds: list[float]
    """Tokens per second in each round in which it succeeded."""
    ratios: list[float]
    """Our speed / its speed in each round in which both succeeded; none for ours."""
    l0: float | None


def make_rows(results: Iterable[dict[str, Any]]) -> list[Row]:
    """Make a row for each tool, variant and SAE (architecture and setting), ours first."""
    groups: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    for r in results:
        key = r["architecture"], r["setting"], r["tool"], r["variant"]
        groups.setdefault(key, {})[r["round"]] = r
    table = []
    for key in sorted(groups, key=lambda k: (k[:2], k[2] != OURS, k)):
        runs = groups[key]
        speeds = {n: r["tokens_per_second"] for n, r in runs.items()}
        ours = groups.get((*key[:2], OURS, ""), {}) if key[2] != OURS else {}
        ratios = [ours[n]["tokens_per_second"] / s for n, s in speeds.items() if n in ours]
        table.append(Row(*key, list(speeds.values()), ratios, next(iter(runs.values()))["l0"]))
    return table


def _show(results: list[dict[str, Any]], tools: dict[str, str]) -> None:
    """Print median and range of each contestant's speed, and how many times as fast ours is."""
    names = ("SAE", "tool", "tokens/s", "from", "to", "L0", "ours is", "from", "to")
    table = Table(*names, box=None, padding=(0, 1, 0, 0))
    for row in make_rows(results):
        table.add_row(
            f"{row.architecture} {row.setting.partition('.')[2]}",
            f"{tools[row.tool]} {row.variant}",
            *_format_spread(row.speeds, ",.0f"),
            "" if row.l0 is None else f"{row.l0:.0f}",
            *_format_spread(row.ratios, ".2f"),
        )
    console.print(table)


def _format_spread(values: list[float], form: str) -> list[str]:
    """Format median, minimum and maximum."""
    return [format(f(values), form) if values else "" for f in (median, min, max)]


if __name__ == "__main__":
    run_command(main)
