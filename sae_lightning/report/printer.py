"""Prints results of an analysis at the terminal.

        ▁   █▃         the height of a bar is the strength of the token below it
a cat sat on the mat
"""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate

from rich import box
from rich.cells import cell_len
from rich.console import ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sae_lightning.report.catalogue import BEFORE, Catalogue
from sae_lightning.report.section import (
    ColouredText,
    ResultTable,
    Section,
    show_token,
    split_quoted,
)
from sae_lightning.terminal import LEFT_TO_RIGHT, console, make_grid, make_visible

BARS = " ▁▂▃▄▅▆▇█"
MAX_WIDTH = 100  # columns; longer lines are hard to read
STRENGTH_WIDTH = 8  # columns for the peak strength, printed in front of an example
LEFT_OF_PEAK = 0.6  # share of an example's columns before its peak
RIGHT_TO_LEFT = {"R", "AL", "AN"}  # bidirectional classes of right-to-left letters and digits
MAX_NUMBER_WIDTH = 24  # columns; a wider cell is text, which is left-aligned


def print_section(section: Section) -> None:
    """Print a section without its figures."""
    print_lead(section)
    if section.numbers:
        console.print(make_grid(section.numbers))
    if section.table:
        console.print(_make_table(section.table))
    for text in section.texts:
        console.print(Text(make_visible(text.caption), "dim"))
        for bars, line in _split_lines(text, section.max_strength):
            if bars.strip():
                console.print(Text(bars.rstrip(), "dark_orange"))
            console.print(line)


def print_lead(section: Section) -> None:
    """Print a section's title and lead."""
    console.print()
    console.print(Text(make_visible(section.title), "bold"))
    console.print(make_visible(section.lead), soft_wrap=False, width=_count_columns())


def print_units(catalogue: Catalogue, units: Sequence[int], examples: int = 3) -> None:
    """Print `units`, each with up to `examples` of its strongest examples, the peaks aligned in one
    column."""
    top = catalogue.top
    for unit in units:
        console.print()
        console.print(_make_heading(catalogue, unit), soft_wrap=False, width=_count_columns())
        for n, strength in enumerate(top.peak_strength[unit, :examples].tolist()):
            if strength > 0:  # 0 where the unit has fewer examples
                tokens = [catalogue.vocabulary[i] if i >= 0 else "" for i in top.tokens[unit, n]]
                shares = top.strengths[unit, n] / catalogue.statistics.maximum[unit]
                bars, line = _align_example([*map(show_token, tokens)], shares.tolist())
                console.print(Text(" " * STRENGTH_WIDTH + bars, "dark_orange"))
                console.print(Text(f"{strength:>{STRENGTH_WIDTH - 2}.3g}  ", "dim").append(line))


def _make_heading(catalogue: Catalogue, unit: int) -> Text:
    """A line about a unit: how often and how strongly it fires, its token set and its copies."""
    statistics, token_sets = catalogue.statistics, catalogue.token_sets
    heading = Text(f"{catalogue.kind} {unit}", "bold")
    density, maximum = float(statistics.densities[unit]), float(statistics.maximum[unit])
    if not density:
        return heading.append("  never fires", "not bold")
    heading.append(f"  fires on {100 * density:.3g} % of tokens, maximum {maximum:.3g}", "not bold")
    # a score is NaN if the unit fires too rarely, and below 0 if its set predicts worse than chance
    if token_sets is not None and float(token_sets.score[unit]) >= 0:
        ids = [i for i in token_sets.tokens[unit].tolist() if i >= 0][:5]  # -1 is padding
        after = "after " if token_sets.previous[unit] else ""  # fires after the ids, or on them
        tokens = " ".join(isolate(f"‘{show_token(catalogue.vocabulary[i])}’") for i in ids)
        score = f", token score {float(token_sets.score[unit]):.2f}: {after}{tokens}"
        heading.append(score, "not bold")
    if catalogue.copy_of is not None:
        copies = int((catalogue.copy_of == unit).sum()) - 1  # without itself; a copy gets -1
        text = f", and {copies} {'copy' if copies == 1 else 'copies'}" if copies > 0 else ""
        heading.append(text, "not bold")
    return heading


def _count_columns() -> int:
    """Number of columns in which text is wrapped."""
    return min(console.width, MAX_WIDTH)


def _make_table(results: ResultTable) -> Table:
    """Lay out a table; if it is too wide, rich wraps its widest columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(results.header):
        width = max((cell_len(row[i]) for row in results.rows), default=0)
        is_text = i == 0 or width > MAX_NUMBER_WIDTH
        table.add_column(
            Text(make_visible(heading)), justify="left" if is_text else "right", overflow="fold"
        )
    for row in results.rows:
        table.add_row(*(_make_cell(split_quoted(make_visible(cell))) for cell in row))
    return table


def _make_cell(parts: list[str]) -> "QuotedTokens | Text":
    """Make a cell of its `parts` from `split_quoted`: several quoted tokens, or one text."""
    return QuotedTokens(parts) if len(parts) > 1 else Text(parts[0])


class QuotedTokens:
    """A cell of quoted tokens, which wraps only between tokens."""

    def __init__(self, tokens: list[str]):
        self.tokens = [*map(isolate, tokens)]

    def __rich_measure__(self, *_) -> Measurement:
        return Measurement(max(map(cell_len, self.tokens)), cell_len(" ".join(self.tokens)))

    def __rich_console__(self, _, options: ConsoleOptions) -> Iterator[Text]:
        lines = [self.tokens[0]]
        for token in self.tokens[1:]:
            line = f"{lines[-1]} {token}"
            if cell_len(line) <= options.max_width:
                lines[-1] = line
            else:
                lines.append(token)
        yield Text("\n".join(lines))


def isolate(token: str) -> str:
    """Put direction marks around a right-to-left token, so that a terminal does not also reorder
    the tokens beside it."""
    is_rtl = any(unicodedata.bidirectional(character) in RIGHT_TO_LEFT for character in token)
    return f"{LEFT_TO_RIGHT}{token}{LEFT_TO_RIGHT}" if is_rtl else token


def _draw_bar(share: float, text: str) -> str:
    """Draw a bar over each column of `text` except its leading spaces. `share` is its height, where
    1 is the full height; 0 and less draw nothing."""
    # however small, a strength above 0 has a bar
    bar = BARS[max(1, round(share * (len(BARS) - 1)))] if share > 0 else " "
    word = text.lstrip(" ") or text
    return " " * (len(text) - len(word)) + bar * cell_len(word)


def _split_lines(text: ColouredText, max_strength: float) -> Iterator[tuple[str, str]]:
    """Wrap a text: yield each line, with the bars above it, as (bars, line)."""
    bars = line = ""
    for token, strength in zip(text.tokens, text.strengths, strict=True):
        visible = show_token(token)
        if line and cell_len(line + visible) > _count_columns():
            yield bars, line
            bars, line, visible = "", "", visible.lstrip(" ")
        bars += _draw_bar(strength / max_strength, visible)
        line += isolate(visible)
        if "\n" in token:
            yield bars, line
            bars = line = ""
    if line:
        yield bars, line


def _align_example(tokens: list[str], shares: list[float]) -> tuple[str, Text]:
    """Make the bars and the line of an example, cut and padded so that the peak is in a fixed
    column. `tokens` come from `show_token`, `shares` are strengths as shares of the unit's maximum;
    the peak is at index BEFORE."""
    columns = _count_columns() - STRENGTH_WIDTH
    left = int(columns * LEFT_OF_PEAK)
    first = BEFORE - _count_fitting(tokens[:BEFORE][::-1], left)
    end = BEFORE + _count_fitting(tokens[BEFORE:], columns - left)
    pad = " " * (left - cell_len("".join(tokens[first:BEFORE])))
    bars = "".join(map(_draw_bar, shares[first:end], tokens[first:end]))
    isolated = [*map(isolate, tokens)]
    line = Text(pad + "".join(isolated[first:BEFORE]))
    line.append(isolated[BEFORE], "bold").append("".join(isolated[BEFORE + 1 : end]))
    return (pad + bars).rstrip(), line


def _count_fitting(texts: list[str], columns: int) -> int:
    """Count how many texts, from the first on, fit into `columns` together."""
    return sum(width <= columns for width in accumulate(map(cell_len, texts)))
