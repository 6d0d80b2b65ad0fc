"""The report of a sweep: sweep.csv, sweep.html and a table at the terminal, of one `SweepTable`."""

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
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # what spreadsheets take for its beginning
LINKED_FILES = ("config.yaml", "metrics.json", "failure.json", "sae")


def write_report(folder: Path, runs: list[SweepRun]) -> None:
    """Write the report of a sweep's runs into its folder, and print the table."""
    with phase("writing the report"):
        table = SweepTable(runs)
        remove_leftovers(folder)
        with write_atomically(folder / CSV) as temporary:
            # for programs: to the last digit, and NaN told from what is missing
            frame = table.frame.mask(table.frame.map(lambda value: value != value), "nan")
            texts = frame.map(lambda value: isinstance(value, str))
            frame = frame.mask(texts, frame.map(disarm_formula)).rename(columns=disarm_formula)
            frame.to_csv(temporary, index=False, lineterminator="\n")
        with write_atomically(folder / PAGE) as temporary:
            temporary.write_text(_render_page(folder, table), encoding="utf8")
    _print_table(folder, table)


def disarm_formula(cell: object) -> object:
    """A text on one line of which no spreadsheet makes a formula; numbers, also those that were
    typed, stay as they are."""
    if not isinstance(cell, str):
        return cell
    is_word, *_ = make_natural_key(cell)
    return "'" * (is_word and cell.startswith(FORMULA_STARTS)) + make_visible(cell)


def _print_table(folder: Path, table: SweepTable) -> None:
    """The table for people, the reasons of failures, and where to look next."""
    drawn = _make_table(table)
    # a line too long for the terminal wraps; squeezed columns could not be read at all
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
        console.print(f"{unfinished} of {len(table.runs)} runs did not come to their end")
    where = shorten_path(folder)
    console.print(
        f"\n  open in a browser: {where / PAGE}\n  the same numbers: {where / CSV}\n"
        f"  {format_tensorboard_command(folder)}\n"
    )


def _make_table(table: SweepTable) -> Table:
    frame = table.frame
    words = {key: frame[key] for key in table.keys} or {"run": frame.folder}
    columns = {heading: [*map(Text, map(make_visible, texts))] for heading, texts in words.items()}
    columns |= {column.heading: _make_cells(table, name) for name, column in table.columns.items()}
    # what is the same for all would only make lines longer
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
        # a space where others have a star keeps the digits below one another
        written = f"{mark}{table.columns[name].format_value(value)}{'*' if best else ' '}"
        cells.append(Text(written, "bold" * bool(best)))
    return cells


def _render_page(folder: Path, table: SweepTable) -> str:
    """The page for a sweep in `folder`, which is where its links start from."""
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
    """What the runs were trained on; where they differ, the values that occur."""
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
    """Where the activations came from."""
    get = settings.get
    if get("data.concepts"):
        return {"concepts": f"{get('data.concepts'):,} in {get('data.dim'):,} dimensions"}
    # a transcoder has a second kind: what it reconstructs
    kinds = dict.fromkeys([get("layer.source"), get("layer.target") or get("layer.source")])
    return {
        "LLM": get("llm.name"),
        "site": " -> ".join(f"{kind}.{get('layer.index')}" for kind in kinds),
        "text": get("data.name") or get("data.path") or "Shakespeare's plays",
    }


def _collect_points(table: SweepTable, group: str | None) -> "pd.DataFrame":
    """The points of `tradeoff`, without their quality, for a legend in the order of values."""
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
    """A swept value for a label: a sweeper that searches gives numbers of 17 digits."""
    is_word, number, _ = make_natural_key(value)
    return value if is_word or len(value) <= 8 else f"{number:.3g}"


def pick_grouping(table: SweepTable) -> str | None:
    """The setting that colours stand for: of several, one with few values, words before numbers."""
    if len(table.keys) < 2:
        return None
    values = {key: set(table.frame[key]) for key in table.keys}
    few = [key for key in table.keys if len(values[key]) <= len(COLOURS)]
    words = {key: any(make_natural_key(value)[0] for value in values[key]) for key in few}
    return min(few, key=lambda key: (not words[key], len(values[key])), default=None)


def _make_links(folder: Path, run: Path) -> dict[str, str]:
    """What there is to open of a run; relative, so that the folder can be moved."""
    link = f"./{quote(Path(os.path.relpath(run, folder)).as_posix())}"
    files = {Path(name).stem: f"{link}/{name}" for name in LINKED_FILES if (run / name).exists()}
    return {"open": f"{link}/", **files}
