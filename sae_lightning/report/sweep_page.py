"""The report of a sweep as one HTML page that needs nothing from the network."""

import math
import os
import shlex
from pathlib import Path
from urllib.parse import quote

from sae_lightning.report.markup import figure, rendered
from sae_lightning.report.pareto import LABELLED, Point, tradeoff
from sae_lightning.report.sweep_table import SweepRun, SweepTable, natural
from sae_lightning.terminal import command, shown

PLOTS = {
    "explained_variance": "explained variance",
    "ce_recovered": "CE recovered",
    "recovered": "concepts recovered",
}
FILES = {
    "config.yaml": "config",
    "metrics.json": "metrics",
    "failure.json": "failure",
    "sae": "sae",
}
GROUPS = 6  # colours that a reader can keep apart


def page(folder: Path, table: SweepTable) -> str:
    """The page for a sweep in `folder`, which is where its links start from."""
    group = grouping(table)
    figures = {
        name: tradeoff(_points(table, group, name), label, group) for name, label in PLOTS.items()
    }
    plots = {label: figure(figures[name]) for name, label in PLOTS.items() if figures[name]}
    return rendered(
        "sweep.html",
        figures=bool(plots),
        table=table,
        facts=facts(table.runs),
        plots=plots,
        labels=[key for key in table.keys if key != group] if _is_labelled(table) else [],
        unplotted=_unplotted(table, [name for name in PLOTS if figures[name]]),
        rows=[_row(folder, table, run) for run in table.runs],
        commands=[
            f"tensorboard --logdir {shlex.quote(str(shown(folder)))}",
            command("analyze.py", task="sweep", run=shown(folder)),
        ],
    )


def facts(runs: list[SweepRun]) -> dict[str, str]:
    """What the runs were trained on; where they differ, the values that occur."""
    said: dict[str, list[str]] = {}
    for run in (run for run in runs if run.settings):
        get = run.settings.get
        for name, value in {
            **source(run.settings),
            "SAE": get("model.name"),
            "features": f"{get('model.features'):,}",
            "tokens": f"{get('trainer.tokens'):,}",
        }.items():
            said.setdefault(name, []).append(str(value))
    distinct = {name: list(dict.fromkeys(values)) for name, values in said.items()}
    return {
        name: ", ".join(values) if len(values) <= 4 else f"{len(values)} different"
        for name, values in distinct.items()
    }


def source(settings: dict) -> dict[str, str]:
    """Where the activations came from."""
    get = settings.get
    if get("data.concepts"):
        return {"concepts": f"{get('data.concepts'):,} in {get('data.dim'):,} dimensions"}
    return {
        "LLM": get("llm.name"),
        "site": " -> ".join(f"{kind}.{get('layer.index')}" for kind in _kinds(settings)),
        "text": get("data.name") or get("data.path") or "Shakespeare's plays",
    }


def _kinds(settings: dict) -> list[str]:
    """What a run read at its block and, for a transcoder, what it reconstructed."""
    kinds = settings.get("layer.source"), settings.get("layer.target")
    return [kind for kind in dict.fromkeys(kinds) if kind is not None]


def _points(table: SweepTable, group: str | None, quality: str) -> list[Point]:
    labelled = [key for key in table.keys if key != group]
    points = []
    for run in table.runs:
        if run.status != "finished":
            continue
        lines = [table.name(run)] if not table.keys else []
        lines += [f"{key} = {run.typed.get(key, '')}" for key in table.keys]
        lines += [
            f"{column.label}: {column.written(run.numbers.get(name))}"
            for name, column in table.columns.items()
        ]
        points.append(
            Point(
                l0=run.numbers.get("l0", math.nan),
                quality=run.numbers.get(quality, math.nan),
                label=", ".join(brief(run.typed.get(key, "")) for key in labelled),
                group=run.typed.get(group, "–") if group else "",
                details="\n".join(lines),
            )
        )
    # the legend is in the order of values
    return sorted(points, key=lambda point: natural(point.group))


def brief(value: str) -> str:
    """A swept value for a label: a sweeper that searches gives numbers of 17 digits."""
    is_word, number, _ = natural(value)
    return value if is_word or len(value) <= 8 else f"{number:.3g}"


def grouping(table: SweepTable) -> str | None:
    """The setting that colours stand for: of several, one with few values, words before numbers."""
    if len(table.keys) < 2:
        return None
    values = {key: {run.typed.get(key, "") for run in table.runs} for key in table.keys}
    few = [key for key in table.keys if len(values[key]) <= GROUPS]
    words = {key: any(natural(value)[0] for value in values[key]) for key in few}
    return min(few, key=lambda key: (not words[key], len(values[key])), default=None)


def _is_labelled(table: SweepTable) -> bool:
    return table.count("finished") <= LABELLED


def _unplotted(table: SweepTable, plotted: list[str]) -> int:
    """Finished runs that are missing in one of the plots."""
    return sum(
        not all(math.isfinite(run.numbers.get(name, math.nan)) for name in plotted)
        for run in table.runs
        if run.status == "finished"
    )


def _row(folder: Path, table: SweepTable, run: SweepRun) -> dict[str, object]:
    """What the template shows of a run; links are relative, so that the folder can be moved."""
    link = quote(Path(os.path.relpath(run.folder, folder)).as_posix())
    files = {
        label: f"{link}/{file}" for file, label in FILES.items() if (run.folder / file).exists()
    }
    return {
        "folder": run.folder.name,
        "link": f"./{link}/",
        "files": {label: f"./{target}" for label, target in files.items()},
        "swept": [(value, _sortable(natural(value))) for value in table.swept(run)],
        "numbers": [
            {
                "text": column.written(run.numbers.get(name)),
                "sort": run.numbers.get(name, ""),
                "best": table.is_best(run, name),
            }
            for name, column in table.columns.items()
        ],
        "front": run.folder in table.front,
        "tokens": run.tokens,
        "status": run.status,
        "reason": run.failure or "",
    }


def _sortable(key: tuple[bool, float, str]) -> float | str:
    is_word, number, value = key
    return value if is_word else number
