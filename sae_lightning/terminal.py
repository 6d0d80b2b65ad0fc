"""What a person at the terminal sees while something slow runs (rich only).

One live display at a time: a phase that starts inside another adds a line to its bar.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)
_live: list[Progress] = []


@contextmanager
def display(bar: Progress) -> Iterator[Progress]:
    """Make `bar` the live display; phases inside it become lines of it."""
    with bar:
        _live.append(bar)
        try:
            yield bar
        finally:
            _live.remove(bar)


@contextmanager
def phase(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar (a spinner where `total` is None) until the block ends; yields `advance(n)`.

    Without a terminal (a batch job's log) it prints one line with the seconds taken.
    """
    started = time.monotonic()
    if _live:
        bar = _live[-1]
        task = bar.add_task(description, total=total)
        try:
            yield lambda n=1: bar.advance(task, n)
        finally:
            bar.remove_task(task)
    else:
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *([BarColumn(), MofNCompleteColumn()] if total else []),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        with display(bar):
            task = bar.add_task(description, total=total)
            yield lambda n=1: bar.advance(task, n)
    if not console.is_terminal:
        console.print(f"{description}: done in {time.monotonic() - started:.0f} s")


def grid(rows: dict[str, str], title: str | None = None) -> Table:
    """A table of names and values without lines."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
