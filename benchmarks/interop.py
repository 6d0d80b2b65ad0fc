"""Do other tools open our SAEs, and do we open theirs?

Each tool gets a separate environment, because their packages cannot be installed together; packages
of our environment are reused where their versions fit. The tool opens SAEs of every architecture
that we wrote, and we open those that the tool writes. Both sides run the same raw activations
through each SAE.

    python benchmarks/interop.py                          # installs the tools first: minutes
    python benchmarks/interop.py tools=sparsify,saelens   # only these
    python benchmarks/interop.py run=outputs/<day>/<time> # also this run's dashboards
    python benchmarks/interop.py folder=/tmp/tools        # keep the environments in this folder

The environments stay in `folder` (~/.cache/sae_lightning/interop, 30 to 400 MB each). The SAEs,
logs, and the table as Markdown go to `out` (outputs/interop).

difference    the largest difference between both sides' features or reconstructions, as a share
              of the largest feature or reconstruction
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from command import run_command
from peers.environment import make_environment
from rich.table import Table
from timing.child import Failed, call
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.formats.trained_on import find_origin
from sae_lightning.formats.write_sae import write_sae
from sae_lightning.sae import ARCHITECTURES, SAE, build_sae
from sae_lightning.terminal import console, phase


class Tool(NamedTuple):
    """A tool that opens and writes SAEs; `peers/interop_<its key>.py` runs in its environment."""

    name: str
    packages: tuple[str, ...]
    """What pip installs."""
    format: str | None = None
    """Our name of its format; None if it only writes."""


SAELENS = ("sae-lens==6.54.12",)
COMMIT = "4bb8c0ea10bde09727e14565ec8469656880da53"
# the package of this name on PyPI is a fork
TRACER = f"circuit-tracer @ git+https://github.com/decoderesearch/circuit-tracer@{COMMIT}"
DASHBOARD = "sae_dashboard"
TOOLS = {
    "saelens": Tool("SAELens", SAELENS, "saelens"),
    "suites": Tool("suites in SAELens", SAELENS),
    "sparsify": Tool("sparsify", ("eai-sparsify==1.3.3",), "sparsify"),
    "dictionary_learning": Tool(
        "dictionary_learning", ("dictionary-learning==0.1.0",), "dictionary_learning"
    ),
    "llamascopium": Tool("llamascopium", ("llamascopium==2.0.0b34",), "llamascopium"),
    "circuit_tracer": Tool("circuit-tracer", (TRACER,), "circuit_tracer"),
    # without its dependencies, which do not fit ours and which its file classes do not need
    DASHBOARD: Tool("SAEDashboard", ("--no-deps", "sae-dashboard==0.8.0"), "saedashboard"),
}
OPTIONS = ("tools", "run", "folder", "out")
KINDS = ("", " transcoder", " skip transcoder")  # after the architecture, in an SAE's name
WIDTH, FEATURES = 16, 40
SPARSITY = {"topk": {"k": 7}, "batch_topk": {"k": 7}, "matryoshka": {"k": 7, "groups": [0.1, 0.3]}}
SITE = {"model_name": "gpt2", "hook_name": "blocks.0.hook_resid_post"}
SITES = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.hook_mlp_out"}


class Row(NamedTuple):
    """SAEs that one side wrote, and which of them the other opened."""

    tool: str
    """Name and version."""
    direction: str
    """opens ours, or opened by us"""
    opened: list[str]
    difference: float
    refused: dict[str, str]
    """Name of the SAE -> why."""


def main(command_line: list[str]) -> None:
    """Try every tool, and print the table."""
    options = dict(argument.split("=", 1) for argument in command_line if "=" in argument)
    if stray := [a for a in command_line if a.partition("=")[0] not in OPTIONS or "=" not in a]:
        raise UserError(f"{stray[0]}: unknown; give {'=, '.join(OPTIONS)}=")
    selection = options["tools"].split(",") if "tools" in options else [*TOOLS]
    if unknown := [tool for tool in selection if tool not in TOOLS]:
        raise UserError(f"tools={unknown[0]}: no such tool; choose from {', '.join(TOOLS)}")
    cache = Path(options.get("folder", Path.home() / ".cache" / "sae_lightning" / "interop"))
    out = Path(options.get("out", "outputs/interop")).absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    torch.save(2 * torch.randn(200, WIDTH, generator=generator) + 1, out / "x.pt")
    rows: list[Row] = []
    for key in selection:
        if key == DASHBOARD and "run" not in options:
            continue
        tool = TOOLS[key]
        try:
            with phase(f"{tool.name}: environment"):
                python = make_environment(cache.absolute(), tool.packages, out / key)
            with phase(f"{tool.name}: exchange"):
                if key == DASHBOARD:
                    rows.append(try_dashboards(options["run"], out / key, python))
                else:
                    rows += try_tool(key, out, python)
        except Failed as failure:
            console.print(f"{tool.name}: {failure}")
    table = Table(*COLUMNS, show_lines=True)
    for row in rows:
        table.add_row(*(column(row) for column in COLUMNS.values()))
    console.print(table)
    (out / "interop.md").write_text(make_markdown(rows), "utf8")
    console.print(f"the table is in {out / 'interop.md'}")


def try_tool(key: str, out: Path, python: str) -> list[Row]:
    """Have the tool open our SAEs, and open its own."""
    tool, folder = TOOLS[key], out / key
    saes, refused = write_ours(tool.format, folder / "ours") if tool.format else ({}, {})
    settings = {"tool": key, "theirs": str(folder / "theirs"), "inputs": str(out / "x.pt")}
    settings["ours"] = {name: str(folder / "ours" / name) for name in saes}
    answer = call("peers.exchange:exchange", settings, folder / "exchange.log", python)
    label, rows = f"{tool.name} {answer['version']}", []
    if tool.format:
        errors = answer["errors"]
        names = [name for name in saes if not errors[name]]
        refused |= {name: f"{tool.name}: {errors[name]}" for name in saes if errors[name]}
        differences = [compare(saes[name], out, folder / "ours" / f"{name}.pt") for name in names]
        rows.append(Row(label, "opens ours", names, max(differences, default=0.0), refused))
    names, differences, refused = [], [], {}
    for name in answer["names"]:
        theirs = folder / "theirs" / name
        try:
            differences.append(compare(load_sae(theirs), out, Path(f"{theirs}.pt")))
            names.append(name)
        except UserError as error:
            refused[name] = str(error).removeprefix(f"{theirs}").lstrip("/: ")
    return [*rows, Row(label, "opened by us", names, max(differences, default=0.0), refused)]


def try_dashboards(run: str, folder: Path, python: str) -> Row:
    """Export the dashboards of a run, and have SAEDashboard read them."""
    target = folder / "dashboards"
    command = [sys.executable, str(Path(__file__).parents[1] / "analyze.py"), f"run={run}"]
    command += ["task=export", "format=saedashboard", f"to={target}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["the export failed"])[-1])
    settings, log = {"folder": str(target)}, folder / "read.log"
    answer = call(f"peers.interop_{DASHBOARD}:read_dashboards", settings, log, python)
    label = f"{TOOLS[DASHBOARD].name} {answer['version']}"
    features = f"{answer['features']} features"
    return Row(label, "opens ours", [features], answer["difference"], {})


def write_ours(format: str, folder: Path) -> tuple[dict[str, SAE], dict[str, str]]:
    """Write an SAE of each architecture and each of KINDS. Returns name -> SAE of those that were
    written, and name -> reason of those that were refused."""
    saes, refused = {}, {}
    for architecture, kind in product(ARCHITECTURES, KINDS):
        name = architecture + kind
        sae = make_sae(architecture, kind)
        (folder / name).mkdir(parents=True)
        try:
            write_sae(format, sae, find_origin(sae.metadata, name, None), folder / name)
            saes[name] = sae
        except UserError as error:
            refused[name] = str(error)
    return saes, refused


@torch.no_grad()
def make_sae(architecture: str, kind: str) -> SAE:
    """Make an SAE whose weights are all random, as if it had been trained."""
    settings = SPARSITY.get(architecture, {}) | {"skip": "skip" in kind}
    config = ARCHITECTURES[architecture].config(
        name=architecture, features=FEATURES, start_bias=0, **settings
    )
    sae = build_sae(config, WIDTH, WIDTH)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    if architecture in ("batch_topk", "matryoshka"):
        sae.threshold += 0.8
    sae.metadata = SITE | (SITES if kind else {})
    return sae.requires_grad_(False).eval()


@torch.no_grad()
def compare(sae: SAE, out: Path, results: Path) -> float:
    """The largest difference between our outputs and theirs, which are in the file `results`."""
    both = zip(sae(torch.load(out / "x.pt")), torch.load(results), strict=True)
    return max(measure_difference(ours, theirs) for ours, theirs in both)


def measure_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest number in `theirs`; infinite
    if their shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def list_names(names: Iterable[str]) -> str:
    """The names of SAEs as text: ours grouped by kind, paths on the hub shortened."""
    groups: dict[str, list[str]] = {}
    for name in names:
        owner_name_folder = name.split("/")[:3]  # of a path on the hub
        name = "/".join(owner_name_folder[-2:])
        architecture, _, kind = name.partition(" ")
        ours = architecture in ARCHITECTURES and f" {kind}" in KINDS
        groups.setdefault(f"{kind}s " if ours else "", []).append(architecture if ours else name)
    return "; ".join(kind + ", ".join(group) for kind, group in groups.items())


def describe_refusals(row: Row) -> str:
    """What was refused, and why: a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in row.refused.items():
        # without the architecture's name, so that SAEs with the same reason share a line
        general = reason.replace(f" {name.partition(' ')[0]} ", " such ")
        reasons.setdefault(general.removesuffix("; choose another format"), []).append(name)
    return "\n".join(f"{list_names(names)}: {reason}" for reason, names in reasons.items())


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tool": lambda row: row.tool,
    "": lambda row: row.direction,
    "SAEs": lambda row: list_names(row.opened),
    "difference": lambda row: f"{row.difference:.0e}" if row.difference else "0",
    "refused": describe_refusals,
}


def make_markdown(rows: list[Row]) -> str:
    """The table for a page."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[column(row).replace("\n", "<br>") for column in COLUMNS.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    run_command(main)
