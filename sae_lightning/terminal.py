"""What a person at the terminal sees while something slow runs (rich only).

One live display at a time: a phase that starts inside another adds a line to its bar.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

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
from rich.text import Text


class Terminal(Console):
    """What a person reads; whoever stops reading does not stop the run."""

    def on_broken_pipe(self) -> None:
        """Say so, where that is still read, and write to nowhere from now on (rich would exit)."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        try:
            sys.stderr.write("nobody reads the output any more: going on without it\n")
        except OSError:
            os.dup2(nowhere, sys.stderr.fileno())


# no markup: a path such as runs/[a]/b is not a style
console = Terminal(highlight=False, soft_wrap=True, markup=False)
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
    alone = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *([BarColumn(), MofNCompleteColumn()] if total else []),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with nullcontext(_live[-1]) if _live else display(alone) as bar:
        task = bar.add_task(description, total=total)
        try:
            yield lambda n=1: bar.advance(task, n)
        finally:
            bar.remove_task(task)
    if not console.is_terminal:
        console.print(f"{description}: done in {time.monotonic() - started:.0f} s")


def grid(rows: dict[str, str], title: str | None = None) -> Table:
    """A table of names and values without lines."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def shown(folder: Path) -> Path:
    """`folder` as a person would type it: relative, if it is below the working folder."""
    folder = folder.absolute()
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def command(program: str, **settings: object) -> str:
    """A command line to paste: python `program` setting=value ..."""
    return shlex.join(["python", program, *(f"{k}={v}" for k, v in settings.items())])
