"""How fast are other tools at the same work, on the same machine, in the same hour?

Every tool trains from text to SAE: the same LLM folder, text, features, batch and context, as many
tokens, each run in a process of its own. The runs of the tools alternate, and the next round goes
through them backwards, so that a machine that grows slower is no one's disadvantage. The clock runs
from before the first fill of the tool's buffer to the last update: loading, tokenising, evaluating
and saving are not counted. `peers/speed_*.py` say what a tool is given "as documented" and what
"tuned" adds.

    python benchmarks/speed.py                           # 2 rounds of ReLU and BatchTopK
    python benchmarks/speed.py peer_tokens=51200         # quicker: the others' speed is constant
    python benchmarks/speed.py runs=topk:model.k=32 only=sae_lightning,sparsify rounds=1
    python benchmarks/speed.py gpu                       # GPT-2 small's shape, as in throughput.py
    python benchmarks/speed.py python=sparsify:/tmp/sparsify/bin/python
    python benchmarks/speed.py trainer.tokens=16384 model.features=512 data.pool=4096 rounds=1

`python` names the interpreter of the environment in which a tool is installed (several: with
commas); a tool that is not installed is left out. `peer_tokens` gives the others fewer tokens. An
option of SAELens' runner as `saelens.<option>=<JSON>` changes its tuned variant. The rest is as in
throughput.py, but for one LLM, and without `sweep` and `profile`; logs and speed.json go to `out`
(outputs/speed).

ours is    our tokens/s / the other's in the same round: the median of the rounds, and their range
"""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from command import command, make_jobs
from rich.table import Table
from throughput import Asked, llm_overrides, read
from timing.child import Failed, call, name_of
from timing.models import truncated
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
GIVEN = ("rounds", "peer_tokens", "only", "python", "out")
NOT_GIVEN = ("sweep", "profile")  # of throughput.py


class Contestant(NamedTuple):
    """What is run once a round."""

    tool: str
    variant: str
    """documented, tuned; nothing for ours."""
    architecture: str
    setting: str
    """How sparse, as an override."""
    python: str = sys.executable

    @property
    def name(self) -> str:
        return name_of(self.tool, self.variant, self.architecture, self.setting)


def main(arguments: list[str]) -> None:
    """Run every tool, every round, and show the ratios."""
    given = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in GIVEN)
    rest = [a for a in arguments if a.partition("=")[0] not in GIVEN]
    options = [a.removeprefix("saelens.").split("=", 1) for a in rest if a.startswith("saelens.")]
    rest = [a for a in rest if not a.startswith("saelens.")]
    if stray := [a for a in rest if a.partition("=")[0] in NOT_GIVEN]:
        raise UserError(f"{stray[0]}: only throughput.py has this; leave it out")
    asked = read([*rest, f"out={given.get('out', 'outputs/speed')}"])
    if len(asked.models) > 1:
        raise UserError(f"models={','.join(asked.models)}: tools are compared on one LLM; give one")
    shutil.rmtree(asked.out / "runs", ignore_errors=True)
    llm = llm_overrides(asked.models[0], asked)
    work = _work(asked, llm, int(given.get("peer_tokens", 0)))
    work["options"] = {name: json.loads(value) for name, value in options}
    contestants, tools = _contestants(asked, given)
    results: list[dict[str, Any]] = []
    for number, contestant in enumerate(order(contestants, int(given.get("rounds", 2)))):
        if result := _run(contestant, number, asked, llm, work):
            results.append({"round": number // len(contestants), **result})
            write_json(asked.out / "speed.json", {"tools": tools, "work": work, "runs": results})
    _show(results, tools)
    console.print(f"the figures are in {asked.out / 'speed.json'}")


def order(contestants: Sequence[Contestant], rounds: int) -> list[Contestant]:
    """Those of one task side by side, every other round backwards."""
    group = sorted(contestants, key=lambda c: (c.architecture, c.setting))
    return [run for n in range(rounds) for run in (group if n % 2 == 0 else group[::-1])]


def _contestants(asked: Asked, given: dict[str, str]) -> tuple[list[Contestant], dict[str, str]]:
    """Ours and the installed tools' variants, and what the tools are called."""
    wanted = given["only"].split(",") if "only" in given else [OURS, *PEERS]
    pythons = dict(pair.split(":", 1) for pair in given.get("python", "").split(",") if pair)
    found = [Contestant(OURS, "", *run) for run in asked.runs if OURS in wanted]
    tools = {OURS: OURS}
    for tool in (t for t in PEERS if t in wanted):
        python = pythons.get(tool, sys.executable)
        try:
            with phase(f"looking for {tool}"):
                log = asked.out / "logs" / f"{tool}.log"
                about = call(f"peers.speed_{tool}:about", {}, log, python)
        except Failed as error:
            console.print(f"{tool} is left out: {error}")
            continue
        tools[tool] = f"{about['name']} {about['version']}"
        found += [
            Contestant(tool, variant, architecture, setting, python)
            for architecture, setting in asked.runs
            for variant in about["variants"]
            if architecture in about["architectures"]
        ]
    return found, tools


def _work(asked: Asked, llm: list[str], peer_tokens: int) -> dict[str, Any]:
    """What the peers are given: files and plain numbers."""
    config = make_jobs([llm], asked.out / "runs")[0].config
    kind = pick_device(config.llm).type
    number = torch.bfloat16 if has_bf16(kind) else torch.float32
    source = dequantise(config.llm.name) if config.llm.name in PACKAGED else Path(config.llm.name)
    cut, module = truncated(source, config.layer.index, number, asked.out / "models")
    steps = min(
        config.trainer.steps, (peer_tokens or config.trainer.tokens) // config.trainer.batch
    )
    tokens = asked.out / "tokens.pt"
    torch.save(_tokens(config, source, steps), tokens)
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
        "bf16": number is torch.bfloat16,
    }


def _tokens(config: Config, source: Path, steps: int) -> torch.Tensor:
    """Sequences [n, context] of the training text, in the order in which we read them: enough to
    fill any tool's buffer and estimate its scale besides the training."""
    data, batch = config.data, config.trainer.batch
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = open_tokens(open_text(data), tokenizer, context=data.context, seed=config.seed)
    wanted = 1.1 * steps * batch + 2 * data.pool + 4 * batch
    return text.train.next(round(wanted / (data.context - 1))).tokens


def _run(
    contestant: Contestant, number: int, asked: Asked, llm: list[str], work: dict[str, Any]
) -> dict[str, Any] | None:
    """One run of one tool; None, and a line that says why, if it fails: the others go on."""
    tool, variant, architecture, setting, python = contestant
    log = asked.out / "logs" / f"{number}-{contestant.name}.log"
    if tool == OURS:
        task = "timing.ours:measure"
        runs = [[f"model={architecture}", *llm, setting]]
        settings = {"runs": runs, "folder": str(asked.out / "runs" / str(number))}
    else:
        task = f"peers.speed_{tool}:measure"
        value = float(setting.partition("=")[2])
        settings = {"architecture": architecture, "variant": variant, "setting": value}
        settings["work"] = work
    try:
        with phase(contestant.name):
            found = call(task, settings, log, python)
    except Failed as error:
        console.print(f"{contestant.name} failed: {error}")
        return None
    speed = found["tokens"] / found["seconds"]
    console.print(f"{contestant.name}: {speed:,.0f} tokens/s")
    about = {"tool": tool, "variant": variant, "architecture": architecture, "setting": setting}
    return about | found | {"tokens_per_second": speed}


class Row(NamedTuple):
    """A tool's variant at one task, in all rounds."""

    architecture: str
    setting: str
    tool: str
    variant: str
    speeds: list[float]
    """Tokens per second, of each round in which it succeeded."""
    ratios: list[float]
    """Of each round in which ours succeeded too; none for ours."""
    l0: float | None


def rows(results: Iterable[dict[str, Any]]) -> list[Row]:
    """The runs of each task (architecture and setting) together, ours first."""
    groups: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    for r in results:
        key = r["architecture"], r["setting"], r["tool"], r["variant"]
        groups.setdefault(key, {})[r["round"]] = r
    found = []
    for key in sorted(groups, key=lambda k: (k[:2], k[2] != OURS, k)):
        runs = groups[key]
        speeds = {n: r["tokens_per_second"] for n, r in runs.items()}
        ours = groups.get((*key[:2], OURS, ""), {}) if key[2] != OURS else {}
        ratios = [ours[n]["tokens_per_second"] / s for n, s in speeds.items() if n in ours]
        found.append(Row(*key, list(speeds.values()), ratios, next(iter(runs.values()))["l0"]))
    return found


def _show(results: list[dict[str, Any]], tools: dict[str, str]) -> None:
    """The median and the range of each contestant's speed, and how many times as fast ours is."""
    names = ("SAE", "tool", "tokens/s", "from", "to", "L0", "ours is", "from", "to")
    table = Table(*names, box=None, padding=(0, 1, 0, 0))
    for row in rows(results):
        table.add_row(
            f"{row.architecture} {row.setting.partition('.')[2]}",
            f"{tools[row.tool]} {row.variant}",
            *_spread(row.speeds, ",.0f"),
            "" if row.l0 is None else f"{row.l0:.0f}",
            *_spread(row.ratios, ".2f"),
        )
    console.print(table)


def _spread(values: list[float], form: str) -> list[str]:
    """The median, the least and the most."""
    return [format(of(values), form) if values else "" for of in (median, min, max)]


if __name__ == "__main__":
    command(main)
