"""How good are the SAEs, against those of other tools given the same work?

Every tool trains on the same activations in the same order (the packaged LLM and text, one pool,
one seed), for as many tokens, in the same batches, with as many features. Each SAE is saved in its
tool's format, loaded by its tool's loader, and scored by one referee that shares no code with this
project (`peers/evaluator.py`). Prints a table and draws L0 against EV and CE recovered.

    python benchmarks/quality.py                              # everything: hours on two cores
    python benchmarks/quality.py only=ours:batch_topk,saelens # a tool, or one architecture of it
    python benchmarks/quality.py trainer.tokens=16384 model.features=512 out=outputs/quick

What is in `out` (outputs/quality) already is not trained again: delete its folder there for that.
SAELens comes with the tests' requirements; `peers/dictionary_learning.py` says how to get that one.
"""

import importlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from command import command
from hydra import compose, initialize_config_dir
from peers.evaluator import SAE, Evaluator
from peers.work import Work, open_work
from rich.table import Column, Table

from sae_lightning.errors import UserError
from sae_lightning.files import write_json
from sae_lightning.formats.export import load_sae
from sae_lightning.llm.load import pick_dtype
from sae_lightning.llm.packaged import dequantise
from sae_lightning.runs.cli import describe_error
from sae_lightning.runs.config import Config, find_conf_folder, to_dataclass
from sae_lightning.runs.jobs import Job, make_job, register_schemas
from sae_lightning.runs.passes import train_jobs
from sae_lightning.sae import ARCHITECTURES
from sae_lightning.terminal import console, phase

OURS = {  # architecture -> what each of its SAEs is given
    "relu": ["loss.target_l0=64"],
    "topk": ["model.k=64"],
    "batch_topk": ["model.k=64"],
    "jumprelu": ["loss.target_l0=64"],
    "gated": ["loss.target_l0=64"],
    "matryoshka": ["model.k=64"],
}
PEERS = ("saelens", "dictionary_learning")
RESULT = "quality.json"
# one evaluation of our own, at the end
SETTINGS = ["layer.index=9", "eval.every=${trainer.tokens}", "data.cache=true"]


class Entry(NamedTuple):
    """One SAE of the benchmark."""

    tool: str
    """Who trains it."""
    version: str
    architecture: str
    label: str
    """What tells it from the tool's others of this architecture."""
    folder: Path
    """Of its weights and its result."""
    train_jobs: Callable[[Work], None] | None
    """Trains and saves it; ours train together on one pass."""
    load: Callable[[], SAE]
    """Opens what was saved."""


def main(arguments: list[str]) -> None:
    """Train what is missing, score it, show everything."""
    given = dict(a.split("=", 1) for a in arguments if a.startswith(("out=", "only=")))
    overrides = [a for a in arguments if not a.startswith(("out=", "only="))]
    out = Path(given.get("out", "outputs/quality"))
    wanted = given["only"].split(",") if "only" in given else []
    register_schemas()
    with initialize_config_dir(find_conf_folder(), version_base="1.3"):
        settings = [*SETTINGS, f"data.cache_folder={out.absolute()}/activations", *overrides]
        config = to_dataclass(compose("config", overrides=settings))
        jobs = _jobs(settings, wanted, out)
    entries = [_ours(job) for job in jobs] + _peers(wanted, out)
    _same_work(out, config)
    todo = [entry for entry in entries if not (entry.folder / RESULT).exists()]
    console.print(f"{len(todo)} of {len(entries)} SAEs are to be trained and scored, in {out}")
    train_jobs([job for job in jobs if not (job.folder / RESULT).exists()])
    work = open_work(config) if any(entry.train for entry in todo) else None
    evaluator = None
    for entry in todo:
        evaluator = evaluator or _evaluator(config)
        name = f"{entry.tool} {entry.architecture} {entry.label}"
        try:
            if entry.train:
                entry.train(work)
            _score(entry, evaluator)
        except Exception as error:  # of one tool: the others are to be compared all the same
            console.print(
                f"{name}: {describe_error(error, []) or f'{type(error).__name__}: {error}'}"
            )
    _show(out)


def _jobs(settings: list[str], wanted: list[str], out: Path) -> list[Job]:
    """Our own SAEs as jobs of one sweep; architectures of later versions are left out."""
    jobs = []
    for architecture, values in OURS.items():
        if not _chosen("ours", architecture, wanted) or architecture not in ARCHITECTURES:
            continue
        for value in values:
            mine = [f"model={architecture}", *settings, value]
            folder = out / "ours" / f"{architecture}-{value.partition('.')[2]}"
            cfg = compose("config", overrides=mine)
            one = make_job(cfg, folder, mine, multirun=True)
            jobs.append(replace(one, sweep_folder=out / "ours"))
    return jobs


def _ours(job: Job) -> Entry:
    def load() -> SAE:
        sae = load_sae(job.folder)
        return lambda x: tuple(sae(x))[:2], sae.W_dec.detach()

    label = job.overrides[-1].partition(".")[2]
    return Entry("sae_lightning", "", job.config.model.name, label, job.folder, None, load)


def _peers(wanted: list[str], out: Path) -> list[Entry]:
    """The SAEs of other tools, as far as they are installed."""
    entries = []
    for name in PEERS:
        if wanted and not any(w.partition(":")[0] == name for w in wanted):
            continue
        try:
            with phase(f"importing {name}"):
                peer = importlib.import_module(f"peers.{name}")
        except ImportError as error:
            console.print(f"{name}: not installed ({error})")
            continue
        for recipe in peer.RECIPES:
            if _chosen(name, recipe.architecture, wanted):
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


def _chosen(tool: str, architecture: str, wanted: list[str]) -> bool:
    return not wanted or tool in wanted or f"{tool}:{architecture}" in wanted


def _same_work(out: Path, config: Config) -> None:
    """UserError if `out` holds results of other work."""
    named = ("llm.name", "layer.", "data.context", "data.pool", "data.held_out", "model.features")
    named += ("trainer.tokens", "trainer.batch", "trainer.precision", "eval.tokens", "seed")
    named += ("llm.dtype", "optim.", "callbacks.")
    work = {name: value for name, value in config.to_flat_dict().items() if name.startswith(named)}
    if config.llm.name != "smollm2":
        raise UserError(f"llm.name={config.llm.name}: the referee reads the packaged LLM only")
    file = out / "work.json"
    if file.exists() and (there := json.loads(file.read_text("utf8"))) != work:
        other = next(name for name in work if there.get(name) != work[name])
        raise UserError(
            f"{out} holds results for {other}={there.get(other)}, not {work[other]}: "
            "choose another folder with out="
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, work)


def _evaluator(config: Config) -> Evaluator:
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
    """The table and the plot of all results in `out`."""
    results = [json.loads(file.read_text("utf8")) for file in sorted(out.glob(f"*/*/{RESULT}"))]
    if not results:
        return
    order = list(OURS)
    results.sort(key=lambda r: (order.index(r["architecture"]), r["tool"], r["l0"]))
    names = "model", "tool", "setting", "L0", "EV", "CE rec.", "unfired", "copies", "nearest"
    # as narrow as a terminal may be: a long setting takes a second line
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
    command(main)
