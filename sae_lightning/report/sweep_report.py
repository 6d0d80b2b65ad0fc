"""The report of a sweep: sweep.csv, sweep_means.csv, sweep.html and a table at the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sae_lightning.files import remove_leftovers, write_atomically
from sae_lightning.report.comparison import compare_with_controls, write_claims
from sae_lightning.report.means import MeansTable
from sae_lightning.report.sweep_page import render_sweep_page
from sae_lightning.report.sweep_table import SweepRun, SweepTable, make_natural_key
from sae_lightning.terminal import (
    console,
    format_tensorboard_command,
    make_visible,
    phase,
    shorten_path,
)

if TYPE_CHECKING:
    import pandas as pd

CSV, MEANS_CSV, PAGE = "sweep.csv", "sweep_means.csv", "sweep.html"
# A spreadsheet reads a text that begins with one of these as a formula.
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")


def write_report(folder: Path, runs: list[SweepRun]) -> None:
    """Write the report of a sweep's runs into its folder, and print the table."""
    with phase("writing the report"):
        table = SweepTable(runs)
        means = MeansTable(table)
        remove_leftovers(folder)
        _write_csv(folder / CSV, table.frame)
        (folder / MEANS_CSV).unlink(missing_ok=True)
        if means.is_repeated:
            _write_csv(folder / MEANS_CSV, means.make_csv_frame())
        with write_atomically(folder / PAGE) as temporary:
            temporary.write_text(render_sweep_page(folder, means), encoding="utf8")
    for sentence in write_claims(means, compare_with_controls(means)):
        console.print(make_visible(sentence))
    _print_table(folder, means)


def _write_csv(path: Path, frame: "pd.DataFrame") -> None:
    """Write `frame` with all digits of its numbers. NaN becomes "nan", so that it differs from a
    missing number."""
    frame = frame.mask(frame.map(lambda value: value != value), "nan")  # True for NaN only
    is_text = frame.map(lambda value: isinstance(value, str))
    frame = frame.mask(is_text, frame.map(disarm_formula)).rename(columns=disarm_formula)
    with write_atomically(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def disarm_formula(cell: object) -> object:
    """Put a ' before a text that a spreadsheet would run as a formula, and make control characters
    visible. Numbers stay as they are, even if given as text."""
    if not isinstance(cell, str):
        return cell
    is_word, *_ = make_natural_key(cell)
    prefix = "'" if is_word and cell.startswith(FORMULA_STARTS) else ""
    return prefix + make_visible(cell)


def _print_table(folder: Path, means: MeansTable) -> None:
    """Print the table of means, why runs failed, and where the files are."""
    table = means.table  # one row per run
    grid = _make_table(means)
    # as wide as its content: a narrow terminal then wraps lines, where rich would squeeze columns
    unbounded = console.options.update(max_width=10_000)
    grid.width = Measurement.get(console, unbounded, grid).maximum
    console.print(grid)
    if means.front.any():
        tie = "   ≈ not significantly different from the best" if means.is_repeated else ""
        console.print(f"  * best of its column{tie}   ● on the Pareto front of L0 and EV")
    frame = table.frame
    for name, status, reason in zip(table.names, frame.status, frame.reason, strict=True):
        if reason is not None:
            console.print(make_visible(f"{status}: {name}: {reason}"))
    unfinished = table.count_runs("unfinished")
    if unfinished:
        console.print(f"{unfinished} of {len(table.runs)} runs did not finish")
    shown = shorten_path(folder)
    averages = f"\n  means and spreads over seeds: {shown / MEANS_CSV}" if means.is_repeated else ""
    console.print(
        f"\n  open in a browser: {shown / PAGE}\n  the same numbers: {shown / CSV}{averages}\n"
        f"  {format_tensorboard_command(folder)}\n"
    )


def _make_table(means: MeansTable) -> Table:
    """Lay out the table of means for the terminal."""
    frame = means.frame
    texts = {key: frame[key] for key in means.keys}
    texts |= {"kind": means.kinds} if means.has_controls else {}
    texts = texts or {"run": frame.folder}
    columns = {heading: [*map(Text, map(make_visible, cells))] for heading, cells in texts.items()}
    columns |= {"seeds": map(str, means.num_finished)} if means.is_repeated else {}
    columns |= {column.header: _make_cells(means, name) for name, column in means.columns.items()}
    title, tokens = "sweep, on held-out data", frame.tokens.dropna().unique()
    if len(tokens) == 1:
        title += f" after {tokens[0]:,} tokens"
    else:
        columns["tokens"] = ["–" if n is None else f"{n:,}" for n in frame.tokens]
    if means.is_repeated:
        title += ": mean ± sample standard deviation over seeds"
    if not means.table.is_finished.all():
        columns["status"] = [
            Text(s, "" if s in ("finished", "unfinished") else "red") for s in frame.status
        ]
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in columns:
        justify = "left" if heading in {*texts, "status"} else "right"
        grid.add_column(Text(make_visible(heading)), justify=justify, no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        grid.add_row(*row)
    return grid


def _make_cells(means: MeansTable, name: str) -> list[Text]:
    """The cells of a metric's column, with the marks of the best row and of the Pareto front."""
    cells = []
    for row in range(len(means.members)):
        front = "● " if name == "l0" and means.front[row] else ""
        mark = means.mark(row, name)
        # a space instead of a mark keeps digits aligned
        text = f"{front}{means.format_cell(row, name)}{mark or ' '}"
        cells.append(Text(text, "bold" if mark == "*" else ""))
    return cells
