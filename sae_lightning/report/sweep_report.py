"""The report of a sweep: sweep.csv, sweep.html and a table at the terminal."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sae_lightning.files import remove_leftovers, write_atomically
from sae_lightning.report.figures import COLOURS, MAX_LABELLED, plot_tradeoff
from sae_lightning.report.page import render_template
from sae_lightning.report.sweep_table import SweepRun, SweepTable, make_natural_key
from sae_lightning.terminal import (
    console,
    format_command,
    format_tensorboard_command,
    make_visible,
    phase,
    shorten_path,
)

if TYPE_CHECKING:
    import pandas as pd

CSV, PAGE = "sweep.csv", "sweep.html"
PLOTTED_METRICS = {
    "explained_variance": "explained variance",
    "ce_recovered": "CE recovered",
    "recovered": "concepts recovered",
}
# A spreadsheet reads a text that begins with one of these as a formula.
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")
LINKED_FILES = ("config.yaml", "metrics.json", "failure.json", "sae")


def write_report(folder: Path, runs: list[SweepRun]) -> None:
    """Write the report of a sweep's runs into its folder, and print the table."""
    with phase("writing the report"):
        table = SweepTable(runs)
        remove_leftovers(folder)
        with write_atomically(folder / CSV) as temporary:
            # full precision, and NaN written as "nan" to tell it from a missing number
            frame = table.frame.mask(table.frame.map(lambda value: value != value), "nan")
            texts = frame.map(lambda value: isinstance(value, str))
            frame = frame.mask(texts, frame.map(disarm_formula)).rename(columns=disarm_formula)
            frame.to_csv(temporary, index=False, lineterminator="\n")
        with write_atomically(folder / PAGE) as temporary:
            temporary.write_text(_render_page(folder, table), encoding="utf8")
    _print_table(folder, table)


def disarm_formula(cell: object) -> object:
    """Quote a text that a spreadsheet would run as a formula, and escape control characters.
    Numbers stay as they are, even if given as text."""
    if not isinstance(cell, str):
        return cell
    is_word, *_ = make_natural_key(cell)
    return "'" * (is_word and cell.startswith(FORMULA_STARTS)) + make_visible(cell)


def _print_table(folder: Path, table: SweepTable) -> None:
    """Print the table, why runs failed, and where the files are."""
    drawn = _make_table(table)
    # full width: the terminal wraps long lines, while squeezed columns would be unreadable
    unbounded = console.options.update(max_width=10_000)
    drawn.width = Measurement.get(console, unbounded, drawn).maximum
    console.print(drawn)
    if table.front.any():
        console.print("  * best of its column   ● on the Pareto front of L0 and EV")
    frame = table.frame
    for name, status, reason in zip(table.names, frame.status, frame.reason, strict=True):
        if reason is not None:
            console.print(make_visible(f"{status}: {name}: {reason}"))
    unfinished = table.count_runs("unfinished")
    if unfinished:
        console.print(f"{unfinished} of {len(table.runs)} runs did not finish")
    where = shorten_path(folder)
    console.print(
        f"\n  open in a browser: {where / PAGE}\n  the same numbers: {where / CSV}\n"
        f"  {format_tensorboard_command(folder)}\n"
    )


def _make_table(table: SweepTable) -> Table:
    frame = table.frame
    words = {key: frame[key] for key in table.keys} or {"run": frame.folder}
    columns = {heading: [*map(Text, map(make_visible, texts))] for heading, texts in words.items()}
    columns |= {column.header: _make_cells(table, name) for name, column in table.columns.items()}
    # a value that all runs share goes into the title
    title, trained = "sweep, on held-out data", frame.tokens.dropna().unique()
    if len(trained) == 1:
        title += f" after {trained[0]:,} tokens"
    else:
        columns["tokens"] = ["–" if n is None else f"{n:,}" for n in frame.tokens]
    if not table.is_finished.all():
        columns["status"] = [Text(s, "red" * (s in ("failed", "damaged"))) for s in frame.status]
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in columns:
        justify = "left" if heading in {*words, "status"} else "right"
        drawn.add_column(Text(make_visible(heading)), justify=justify, no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        drawn.add_row(*row)
    return drawn


def _make_cells(table: SweepTable, name: str) -> list[Text]:
    cells = []
    for value, best, front in zip(table.frame[name], table.best[name], table.front, strict=True):
        mark = "● " if front and name == "l0" else ""
        # a space instead of a star keeps digits aligned
        written = f"{mark}{table.columns[name].format_value(value)}{'*' if best else ' '}"
        cells.append(Text(written, "bold" * bool(best)))
    return cells


def _render_page(folder: Path, table: SweepTable) -> str:
    """Render the page of a sweep; its links are relative to `folder`."""
    group = pick_grouping(table)
    points = _collect_points(table, group)
    drawn = {
        name: plot_tradeoff(points.assign(quality=table.finite[name]), label, group)
        for name, label in PLOTTED_METRICS.items()
    }
    plotted = [name for name, plot in drawn.items() if plot]
    few = table.count_runs("finished") <= MAX_LABELLED
    return render_template(
        "sweep.html",
        figures=bool(plotted),
        table=table,
        facts=describe_runs(table.runs),
        plots={PLOTTED_METRICS[name]: drawn[name] for name in plotted},
        labels=[key for key in table.keys if key != group] if few else [],
        unplotted=int(table.finite.loc[table.is_finished, plotted].isna().any(axis=1).sum()),
        links=[_make_links(folder, run.folder) for run in table.runs],
        commands=[
            format_tensorboard_command(folder),
            format_command("analyze.py", task="sweep", run=shorten_path(folder)),
        ],
    )


def describe_runs(runs: list[SweepRun]) -> dict[str, str]:
    """Describe the data and SAEs of the runs; a row lists up to four different values."""
    values: dict[str, list[str]] = {}
    for settings in (run.settings for run in runs if run.settings):
        for name, value in {
            **describe_source(settings),
            "SAE": settings["model.name"],
            "features": f"{settings['model.features']:,}",
            "tokens": f"{settings['trainer.tokens']:,}",
        }.items():
            if str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
    return {
        name: ", ".join(different) if len(different) <= 4 else f"{len(different)} different"
        for name, different in values.items()
    }


def describe_source(settings: dict) -> dict[str, str]:
    """Describe where a run's activations come from: LLM, site and text, or concepts."""
    get = settings.get
    if get("data.concepts"):
        return {"concepts": f"{get('data.concepts'):,} in {get('data.dim'):,} dimensions"}
    if get("data.kind") == "activations":
        data = {"activations": get("data.path")}
    else:
        text = get("data.name") or get("data.path") or "Shakespeare's plays"
        data = {"LLM": get("llm.name"), "text": text}
    # a transcoder reconstructs another kind of site
    kinds = dict.fromkeys([get("layer.source"), get("layer.target") or get("layer.source")])
    return data | {"site": " -> ".join(f"{kind}.{get('layer.index')}" for kind in kinds)}


def _collect_points(table: SweepTable, group: str | None) -> "pd.DataFrame":
    """The points that `plot_tradeoff` takes, without `quality`, sorted by group for the legend."""
    swept = table.frame[table.keys]
    labelled = swept[[key for key in table.keys if key != group]]
    details = []
    for name, run in zip(table.names, table.frame.to_dict("records"), strict=True):
        lines = [f"{key} = {run[key]}" for key in table.keys] or [name]
        lines += [
            f"{c.label}: {c.format_value(run[metric])}" for metric, c in table.columns.items()
        ]
        details.append(lines)
    points = table.finite[["l0"]].assign(
        label=[", ".join(map(shorten_value, values)) for values in labelled.to_numpy()],
        group=swept[group].replace("", "–") if group else "",
        details=details,
    )
    return points.iloc[
        sorted(points.index, key=lambda row: make_natural_key(points.at[row, "group"]))
    ]


def shorten_value(value: str) -> str:
    """Shorten a swept value for a label: search sweepers give numbers of 17 digits."""
    is_word, number, _ = make_natural_key(value)
    return value if is_word or len(value) <= 8 else f"{number:.3g}"


def pick_grouping(table: SweepTable) -> str | None:
    """Pick the swept setting that colours stand for: words before numbers, then the fewest values.
    None if fewer than two settings are swept, or all have more values than there are colours."""
    if len(table.keys) < 2:
        return None
    values = {key: set(table.frame[key]) for key in table.keys}
    few = [key for key in table.keys if len(values[key]) <= len(COLOURS)]
    words = {key: any(make_natural_key(value)[0] for value in values[key]) for key in few}
    return min(few, key=lambda key: (not words[key], len(values[key])), default=None)


def _make_links(folder: Path, run: Path) -> dict[str, str]:
    """Links to the files of a run by label; relative, so that the sweep's folder can be moved."""
    link = f"./{quote(Path(os.path.relpath(run, folder)).as_posix())}"
    files = {Path(name).stem: f"{link}/{name}" for name in LINKED_FILES if (run / name).exists()}
    return {"open": f"{link}/", **files}
