"""Terminal output: the console, progress bars, tables and command lines.

There is one live display at a time: a phase inside another adds a line to it. Names, metadata and
tokens may come from untrusted files, so control characters are printed as symbols.
"""

import os
import shlex
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Ranges (first, last) of invisible characters that are neither control characters nor spaces.
INVISIBLE_RANGES = ("\u034f\u034f", "\u115f\u1160", "\u17b4\u17b5", "\u180b\u180f", "\u2800\u2800")
INVISIBLE_RANGES += ("\u3164\u3164", "\ufe00\ufe0f", "\uffa0\uffa0", "\U000e0100\U000e01ef")
LEFT_TO_RIGHT = "\u200e"  # a mark of zero width that keeps the text beside it in order


class _VisibleSymbols(dict):
    """Code point -> text to print: the character, or its code such as <U+202E> if it is invisible,
    moves the cursor or reverses the order of the text."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        printable = character.isprintable() or unicodedata.category(character) == "Zs"
        invisible = any(first <= character <= last for first, last in INVISIBLE_RANGES)
        self[code] = character if printable and not invisible else f"<U+{code:04X}>"
        return self[code]


SYMBOLS_ONE_LINE = _VisibleSymbols({code: chr(0x2400 + code) for code in range(32)})  # ␀ to ␟
SYMBOLS_ONE_LINE |= {ord("\n"): "↵", ord("\t"): "⇥", 0x7F: "␡"}
SYMBOLS_MULTILINE = _VisibleSymbols(
    SYMBOLS_ONE_LINE | {ord(character): character for character in ("\n", LEFT_TO_RIGHT)}
)


def make_visible(text: str) -> str:
    """The text on one line, with invisible characters as symbols, such as ␛ and <U+202E>."""
    return text if text.isascii() and text.isprintable() else text.translate(SYMBOLS_ONE_LINE)


class Terminal(Console):
    """A console that prints control characters, except line breaks, as symbols, and that survives
    a closed pipe (`train.py | head`)."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(text.translate(SYMBOLS_MULTILINE), style)

    def on_broken_pipe(self) -> None:
        """Report the closed pipe on stderr and discard further output (rich would exit)."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        try:
            sys.stderr.write("the output pipe was closed: going on without output\n")
        except OSError:
            os.dup2(nowhere, sys.stderr.fileno())


# no markup: a path such as runs/[a]/b is not a style
console = Terminal(highlight=False, soft_wrap=True, markup=False)
_live: list[Progress] = []  # the live display, if any


@contextmanager
def show_live(display: Progress) -> Iterator[Progress]:
    """Show `display` until the block ends; phases inside add lines to it."""
    with display:
        _live.append(display)
        try:
            yield display
        finally:
            _live.remove(display)


@contextmanager
def phase(description: str, total: int | None = None) -> Iterator[Callable[[float], None]]:
    """Show a bar (without `total`, a spinner) until the block ends; yields `advance(n)`.

    Without a terminal, as in a log file, it prints only one line at the end, with the seconds.
    """
    started = time.monotonic()
    description = make_visible(description)
    new_display = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *([BarColumn(), MofNCompleteColumn()] if total else []),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    live_display = nullcontext(_live[-1]) if _live else show_live(new_display)
    with live_display as display:
        task = display.add_task(description, total=total)
        try:
            yield lambda n=1: display.advance(task, n)
        finally:
            display.remove_task(task)
    if not console.is_terminal:
        console.print(f"{description}: done in {time.monotonic() - started:.0f} s")


def make_grid(rows: dict[str, str], title: str | None = None) -> Table:
    """A table of names and values without borders."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(make_visible(name), Text(make_visible(value)))
    return table


def shorten_path(folder: Path) -> Path:
    """`folder` for printing: relative if inside the working folder, with invisible characters as
    symbols."""
    folder, here = folder.absolute(), Path.cwd()
    path = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return Path(make_visible(str(path)))


def name_program(script: str) -> str:
    """The program to name in a command line: `script` (train.py or analyze.py), or the command
    sae-train (sae-analyze) if the user typed that or has no scripts, as in a wheel."""
    from_wheel = Path(__file__).with_name("conf").is_dir()  # in a clone, conf/ is beside train.py
    typed = Path(sys.argv[0]).name.startswith("sae-")
    return f"sae-{script.removesuffix('.py')}" if from_wheel or typed else script


def format_program(script: str) -> str:
    """The beginning of a command line: python train.py, or sae-train."""
    program = name_program(script)
    return f"python {script}" if program == script else program


def format_command(script: str, *flags: str, **settings: object) -> str:
    """A command line to paste: python script -flag setting=value ..."""
    parts = [*format_program(script).split(), *flags, *(f"{k}={v}" for k, v in settings.items())]
    return make_visible(shlex.join(parts))


def format_tensorboard_command(folder: Path) -> str:
    """The command line that opens TensorBoard on `folder` and the folders below it."""
    return shlex.join(["tensorboard", "--logdir", str(shorten_path(folder))])


def quote_setting(name: str, value: object) -> str:
    """`name`=`value` to paste into a command line."""
    return shlex.quote(f"{name}={value}")
