"""The report of a sweep: sweep.csv, sweep.html and a table at the terminal."""

import csv
import shlex
from pathlib import Path

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sae_lightning.files import atomically
from sae_lightning.report.sweep_page import page
from sae_lightning.report.sweep_table import SweepRun, SweepTable
from sae_lightning.terminal import console, shown

CSV, PAGE = "sweep.csv", "sweep.html"


def write_report(folder: Path, runs: list[SweepRun]) -> None:
    """Write the report of a sweep's runs into its folder, and print the table."""
    table = SweepTable(runs)
    with atomically(folder / CSV) as temporary:
        write_csv(temporary, table)
    with atomically(folder / PAGE) as temporary:
        temporary.write_text(page(folder, table), encoding="utf8")
    say(folder, table)


def write_csv(path: Path, table: SweepTable) -> None:
    """One row a job, for programs: every held-out metric, by its own name, to the last digit."""
    records = table.records()
    names = list(dict.fromkeys(name for run in table.runs for name in run.numbers))
    last = ["tokens", "status", "reason", "folder"]
    with open(path, "w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, [*table.keys, *names, *last], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def say(folder: Path, table: SweepTable) -> None:
    """The table for people, the reasons of failures, and where to look next."""
    drawn = _drawn(table)
    # a line too long for the terminal wraps; squeezed columns could not be read at all
    unbounded = console.options.update(max_width=10_000)
    drawn.width = Measurement.get(console, unbounded, drawn).maximum
    console.print(drawn)
    if table.front:
        console.print("  * best of its column   ● on the Pareto front of L0 and EV")
    for run in table.runs:
        if run.failure is not None:
            console.print(f"failed: {table.name(run)}: {run.failure}")
    unfinished = table.count("unfinished")
    if unfinished:
        console.print(f"{unfinished} of {len(table.runs)} runs did not come to their end")
    where = shown(folder)
    console.print(
        f"\n  open in a browser: {where / PAGE}\n  the same numbers: {where / CSV}\n"
        f"  tensorboard --logdir {shlex.quote(str(where))}\n"
    )


def _drawn(table: SweepTable) -> Table:
    # what is the same for all would only make lines longer
    trained = {run.tokens for run in table.runs if run.tokens is not None}
    same, all_finished = len(trained) == 1, table.count("finished") == len(table.runs)
    title = "sweep, on held-out data" + "".join(f" after {n:,} tokens" for n in trained if same)
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in table.keys or ["run"]:
        drawn.add_column(Text(key), no_wrap=True)
    for column in table.columns.values():
        drawn.add_column(column.heading, justify="right", no_wrap=True)
    if not same:
        drawn.add_column("tokens", justify="right", no_wrap=True)
    if not all_finished:
        drawn.add_column("status", no_wrap=True)
    for run in table.runs:
        drawn.add_row(
            *map(Text, table.swept(run) or [run.folder.name]),
            *(_cell(table, run, name) for name in table.columns),
            *([] if same else ["–" if run.tokens is None else f"{run.tokens:,}"]),
            *([] if all_finished else [Text(run.status, "red" * (run.status == "failed"))]),
        )
    return drawn


def _cell(table: SweepTable, run: SweepRun, name: str) -> Text:
    text = Text(table.columns[name].written(run.numbers.get(name)))
    if name == "l0" and run.folder in table.front:
        text = Text.assemble("● ", text)
    # a space where others have a star keeps the digits below one another
    best = table.is_best(run, name)
    text.append("*" if best else " ")
    if best:
        text.stylize("bold")
    return text
