"""How good are our SAEs, compared with those of other tools on the same data?

Every tool trains on the same activations in the same order (the packaged LLM and text, one pool,
one seed), for as many tokens, in the same batches, with as many features. Each SAE is saved in its
tool's format, loaded by its tool's loader, and scored by one referee that shares no code with this
project (`peers/evaluator.py`). Prints a table and plots EV and CE recovered against L0.

    python benchmarks/quality.py                              # everything: hours on two cores
    python benchmarks/quality.py only=ours:batch_topk,saelens # a tool, or one architecture of it
    python benchmarks/quality.py trainer.tokens=16384 model.features=512 out=outputs/quick

An SAE that is already in `out` (outputs/quality) is not trained again unless its folder is deleted.
SAELens comes with the tests' requirements; `peers/dictionary_learning.py` says how to install
dictionary_learning.
"""

import importlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from command import run_command
from hydra import compose, initialize_config_dir
from peers.evaluator import Evaluator, OpenedSAE
from peers.work import Work, open_work
from rich.table import Column, Table

from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.formats.load_sae import load_sae
from sae_lightning.llm.load import pick_dtype
from sae_lightning.llm.packaged import dequantise
from sae_lightning.runs.cli import explain_error
from sae_lightning.runs.config import Config, find_conf_folder, to_dataclass
from sae_lightning.runs.jobs import Job, make_job
from sae_lightning.runs.passes import train_jobs
from sae_lightning.runs.schemas import register_schemas
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.terminal import console, phase

OURS = {  # architecture -> an override for each of our SAEs
    "relu": ["loss.target_l0=64"],
    "topk": ["model.k=64"],
    "batch_topk": ["model.k=64"],
    "jumprelu": ["loss.target_l0=64"],
    "gated": ["loss.target_l0=64"],
    "matryoshka": ["model.k=64"],
}
PEERS = ("saelens", "dictionary_learning")
RESULT = "quality.json"
# our own evaluation runs only once, at the end
SETTINGS = ["layer.index=9", "eval.every=${trainer.tokens}", "data.cache=true"]


class Entry(NamedTuple):
    """One SAE of the benchmark."""

    tool: str
    """The tool that trains it."""
    version: str
    architecture: str
    label: str
    """Setting in which it differs from the tool's others of this architecture."""
    folder: Path
    """Folder of its weights and its result."""
    train: Callable[[Work], None] | None
    """Trains and saves it; None for ours, which train together on one pass."""
    load: Callable[[], OpenedSAE]
    """Loads the saved SAE."""


def main(arguments: list[str]) -> None:
    """Train and score the SAEs that are missing in `out`, and show all."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("out=", "only=")))
    overrides = [a for a in arguments if not a.startswith(("out=", "only="))]
    out = Path(options.get("out", "outputs/quality"))
    selection = options["only"].split(",") if "only" in options else []
    register_schemas()
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        settings = [*SETTINGS, f"data.cache_folder={out.absolute()}/activations", *overrides]
        config = to_dataclass(compose("config", overrides=settings))
        jobs = _make_jobs(settings, selection, out)
    entries = [_make_entry(job) for job in jobs] + _make_peer_entries(selection, out)
    _check_same_work(out, config)
    todo = [entry for entry in entries if not (entry.folder / RESULT).exists()]
    console.print(f"{len(todo)} of {len(entries)} SAEs are to be trained and scored, in {out}")
    train_jobs([job for job in jobs if not (job.folder / RESULT).exists()])
    work = open_work(config) if any(entry.train for entry in todo) else None
    evaluator = None
    for entry in todo:
        evaluator = evaluator or _make_evaluator(config)
        name = f"{entry.tool} {entry.architecture} {entry.label}"
        try:
            if entry.train:
                entry.train(work)
            _score(entry, evaluator)
        except Exception as error:  # one tool's failure must not stop the others
            console.print(
                f"{name}: {explain_error(error, []) or f'{type(error).__name__}: {error}'}"
            )
    _show(out)


def _make_jobs(settings: list[str], selection: list[str], out: Path) -> list[Job]:
    """Make the jobs of our own SAEs, one sweep; skips architectures that this version lacks."""
    jobs = []
    for architecture, values in OURS.items():
        if not _is_selected("ours", architecture, selection) or architecture not in ARCHITECTURES:
            continue
        for value in values:
            job_overrides = [f"model={architecture}", *settings, value]
            folder = out / "ours" / f"{architecture}-{value.partition('.')[2]}"
            cfg = compose("config", overrides=job_overrides)
            job = make_job(cfg, folder, job_overrides, multirun=True)
            jobs.append(replace(job, sweep_folder=out / "ours"))
    return jobs


def _make_entry(job: Job) -> Entry:
    def load() -> OpenedSAE:
        sae = load_sae(job.folder)
        return lambda x: tuple(sae(x))[:2], sae.W_dec.detach()

    label = job.overrides[-1].partition(".")[2]
    return Entry("sae_lightning", "", job.config.model.name, label, job.folder, None, load)


def _make_peer_entries(selection: list[str], out: Path) -> list[Entry]:
    """Make the entries of the other tools that are installed."""
    entries = []
    for name in PEERS:
        if selection and not any(item.partition(":")[0] == name for item in selection):
            continue
        try:
            with phase(f"importing {name}"):
                peer = importlib.import_module(f"peers.{name}")
        except ImportError as error:
            console.print(f"{name}: not installed ({error})")
            continue
        for recipe in peer.RECIPES:
            if _is_selected(name, recipe.architecture, selection):
                file = f"{recipe.architecture}-{recipe.label}".replace(", ", "-").replace(" ", "-")
                folder = out / name / file
                entries.append(
                    Entry(
                        tool=peer.NAME,
                        version=peer.VERSION,
                        architecture=recipe.architecture,
                        label=recipe.label,
                        folder=folder,
                        train=lambda work, p=peer, r=recipe, f=folder: p.train(r, work, f),
                        load=lambda p=peer, f=folder: p.load(f),
                    )
                )
    return entries


def _is_selected(tool: str, architecture: str, selection: list[str]) -> bool:
    return not selection or tool in selection or f"{tool}:{architecture}" in selection


def _check_same_work(out: Path, config: Config) -> None:
    """Write the settings to `out`; UserError if it holds results for other settings."""
    prefixes = ("llm.name", "llm.dtype", "layer.", "data.context", "data.pool", "data.held_out")
    prefixes += ("model.features", "trainer.tokens", "trainer.batch", "trainer.precision")
    prefixes += ("eval.tokens", "seed", "optim.", "callbacks.")
    settings = config.to_flat_dict()
    work = {name: value for name, value in settings.items() if name.startswith(prefixes)}
    if config.llm.name != "smollm2":
        raise UserError(f"llm.name={config.llm.name}: the referee reads the packaged LLM only")
    file = out / "work.json"
    if file.exists() and (earlier := json.loads(file.read_text("utf8"))) != work:
        other = next(name for name in work if earlier.get(name) != work[name])
        raise UserError(
            f"{out} holds results for {other}={earlier.get(other)}, not {work[other]}: "
            "choose another folder with out="
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, work)


def _make_evaluator(config: Config) -> Evaluator:
    with phase("the referee reads held-out text"), redirect_stderr(io.StringIO()):
        return Evaluator(
            dequantise(config.llm.name),
            config.data.held_out,
            layer=config.layer.index,
            context=config.data.context,
            tokens=config.eval.tokens,
            dtype=pick_dtype(config.llm),
        )


def _score(entry: Entry, evaluator: Evaluator) -> None:
    with phase(f"scoring {entry.tool} {entry.architecture} {entry.label}"):
        scores = evaluator.score(entry.load())
    about = {name: getattr(entry, name) for name in ("tool", "version", "architecture", "label")}
    write_json(entry.folder / RESULT, about | scores)


def _show(out: Path) -> None:
    """Print the table and draw the plot of all results in `out`."""
    results = [json.loads(file.read_text("utf8")) for file in sorted(out.glob(f"*/*/{RESULT}"))]
    if not results:
        return
    order = list(OURS)
    results.sort(key=lambda r: (order.index(r["architecture"]), r["tool"], r["l0"]))
    names = "model", "tool", "setting", "L0", "EV", "CE rec.", "unfired", "copies", "nearest"
    # fits a narrow terminal: a long setting wraps
    columns = [Column(name, no_wrap=name != "setting") for name in names]
    table = Table(*columns, box=None, padding=(0, 1, 0, 0))
    for r in results:
        table.add_row(
            r["architecture"],
            r["tool"],
            r["label"],
            f"{r['l0']:.1f}",
            f"{r['explained_variance']:.3f}",
            f"{r['ce_recovered']:.3f}",
            f"{r['unfired']:.1%}",
            *(
                form.format(r[name]) if name in r else "–"
                for name, form in (("duplicates", "{:.1%}"), ("nearest_cosine", "{:.2f}"))
            ),
        )
    console.print(table)
    try:
        from peers.plot import draw
    except ImportError:
        console.print("no plot: pip install -c constraints.txt matplotlib")
    else:
        console.print(f"the plot is {draw(results, out / 'quality.png')}")


if __name__ == "__main__":
    run_command(main)
