"""The page of a sweep: its plots, table, and links to every run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sae_lightning.report.comparison import compare_with_controls, write_claims
from sae_lightning.report.figures import COLOURS, MAX_LABELLED, plot_tradeoff
from sae_lightning.report.means import SEED_SETTINGS, TRAINED, MeansTable
from sae_lightning.report.page import render_template
from sae_lightning.report.sweep_table import SweepRun, make_natural_key
from sae_lightning.terminal import format_command, format_tensorboard_command, shorten_path

if TYPE_CHECKING:
    import pandas as pd

PLOTTED_METRICS = {
    "explained_variance": "explained variance",
    "ce_recovered": "CE recovered",
    "recovered": "concepts recovered",
}
LINKED_FILES = ("config.yaml", "metrics.json", "failure.json", "sae")


def render_sweep_page(folder: Path, means: MeansTable) -> str:
    """Render the page of a sweep; its links are relative to `folder`."""
    table, group = means.table, pick_grouping(means)
    points = _collect_points(means, group)
    plots = {
        name: plot_tradeoff(
            points.assign(quality=means.mean[name], spread=means.spread[name]), label, group
        )
        for name, label in PLOTTED_METRICS.items()
    }
    plotted = [name for name, plot in plots.items() if plot]
    comparisons = compare_with_controls(means)
    has_labels = sum(means.num_finished > 0) <= MAX_LABELLED
    finished = table.comparable_metrics[table.is_finished]
    is_unplotted = finished[plotted].isna().any(axis=1)
    return render_template(
        "sweep.html",
        figures=bool(plotted),
        table=table,
        means=means,
        facts=describe_runs(table.runs),
        claims=write_claims(means, comparisons),
        comparisons=comparisons,
        plots={PLOTTED_METRICS[name]: plots[name] for name in plotted},
        labels=[key for key in means.keys if key != group] if has_labels else [],
        unplotted=int(is_unplotted.sum()),
        links=[_make_links(folder, means, row) for row in range(len(means.members))],
        commands=[
            format_tensorboard_command(folder),
            format_command("analyze.py", task="sweep", run=shorten_path(folder)),
        ],
    )


def describe_runs(runs: list[SweepRun]) -> dict[str, str]:
    """Describe the data and SAEs of the runs: label -> the values that occur, or their number if
    they are more than four."""
    values: dict[str, list[str]] = {}
    for settings in (run.settings for run in runs if run.settings):
        described = {
            **describe_activations(settings),
            "SAE": settings["model.name"],
            "features": f"{settings['model.features']:,}",
            "tokens": f"{settings['trainer.tokens']:,}",
        }
        for name, value in described.items():
            if str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
    return {
        name: ", ".join(listed) if len(listed) <= 4 else f"{len(listed)} different"
        for name, listed in values.items()
    }


def describe_activations(settings: dict) -> dict[str, str]:
    """Describe where a run's activations come from: LLM, site and text, or concepts."""
    get = settings.get
    if get("data.concepts"):
        return {"concepts": f"{get('data.concepts'):,} in {get('data.dim'):,} dimensions"}
    if get("data.kind") == "activations":
        data = {"activations": get("data.path")}
    else:
        text = get("data.name") or get("data.path") or "Shakespeare's plays"
        data = {"LLM": get("llm.name"), "text": text}
    kinds = dict.fromkeys([get("layer.source"), get("layer.target") or get("layer.source")])
    return data | {"site": " -> ".join(f"{kind}.{get('layer.index')}" for kind in kinds)}


def _collect_points(means: MeansTable, group: str | None) -> "pd.DataFrame":
    """Make the points that `plot_tradeoff` takes, but without `quality` and its spread, sorted by
    group for the legend."""
    swept = means.frame[means.keys]
    in_labels = swept[[key for key in means.keys if key != group]]
    details = []
    for row, kind in enumerate(means.kinds):
        lines = [f"{key} = {value}" for key, value in swept.loc[row].items()]
        lines = lines or [means.table.names[means.members[row][0]]]
        if means.has_controls:
            lines.append(f"kind = {kind}")
        lines += [f"{c.label}: {means.format_cell(row, name)}" for name, c in means.columns.items()]
        details.append(lines)
    # the legend needs a name for trained SAEs only beside controls
    only_group = TRAINED if means.has_controls else ""
    points = means.mean[["l0"]].assign(
        l0_spread=means.spread["l0"],
        seeds=means.num_finished,
        control=["" if kind == TRAINED else kind for kind in means.kinds],
        label=[", ".join(map(shorten_value, values)) for values in in_labels.to_numpy()],
        group=swept[group].replace("", "–") if group else only_group,
        details=details,
    )
    return points.iloc[
        sorted(points.index, key=lambda row: make_natural_key(points.at[row, "group"]))
    ]


def shorten_value(value: str) -> str:
    """Shorten a swept value for a label: a sweeper that searches gives numbers of 17 digits."""
    is_word, number, _ = make_natural_key(value)
    return value if is_word or len(value) <= 8 else f"{number:.3g}"


def pick_grouping(means: MeansTable) -> str | None:
    """Pick the swept setting that colours the points: preferably one with a word among its values,
    then the one with the fewest values. None if fewer than two settings are swept, or all have more
    values than there are colours."""
    if len(means.keys) < 2:
        return None
    values = {key: set(means.frame[key]) for key in means.keys}
    candidates = [key for key in means.keys if len(values[key]) <= len(COLOURS)]
    words = {key: any(make_natural_key(value)[0] for value in values[key]) for key in candidates}
    return min(candidates, key=lambda key: (not words[key], len(values[key])), default=None)


def _make_links(folder: Path, means: MeansTable, row: int) -> dict[str, str]:
    """Make the links of a row, by label: to a run's folder and files or, if the row has several
    runs, to each folder. Links are relative, so that the sweep's folder can be moved."""
    runs = [means.table.runs[i] for i in means.members[row]]
    links = [f"./{quote(Path(os.path.relpath(run.folder, folder)).as_posix())}" for run in runs]
    if len(runs) > 1:
        names = [name for name in SEED_SETTINGS if name in runs[0].settings]
        columns = [[str(run.settings[name]) for run in runs] for name in names]
        varied = [column for column in columns if len({*column}) > 1]
        labels = [f"seed {', '.join(seeds)}" for seeds in zip(*varied, strict=True)]
        return {label: f"{link}/" for label, link in zip(labels, links, strict=True)}
    files = [name for name in LINKED_FILES if (runs[0].folder / name).exists()]
    return {"open": f"{links[0]}/"} | {Path(name).stem: f"{links[0]}/{name}" for name in files}
