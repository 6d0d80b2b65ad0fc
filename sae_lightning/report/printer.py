"""What analysis found, at the terminal.

        ▁   █▃         the height above a token is its strength
a cat sat on the mat
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from sae_lightning.report import section as sections
from sae_lightning.report.catalogue import BEFORE, Catalogue
from sae_lightning.report.section import Coloured, Section, visible
from sae_lightning.terminal import console, grid

HEIGHTS = " ▁▂▃▄▅▆▇█"
WIDTH = 100  # columns that are easily read
STRENGTH = 8  # columns for the number before an example
SHARE = 0.6  # of the columns left of the peak
LONG = (24, 12, 6)  # columns; a longer cell may be folded, a shorter one only where it has to be
SHORT = 10  # columns; nothing is folded to less
GAP = 2  # columns from one of a table to the next
BETWEEN = re.compile(r"(?<=['’]) (?=['‘])")  # tokens in quotes


def say(section: Section) -> None:
    """Print a section; its figures are for the page only."""
    say_lead(section)
    if section.rows:
        console.print(grid(section.rows))
    if section.table:
        console.print(_table(section.table))
    strongest = max((s for text in section.texts for s in text.strengths), default=0)
    for text in section.texts:
        console.print(Text(text.caption, "dim"))
        for heights, line in _lines(text, strongest, _columns()):
            if heights.strip():
                console.print(Text(heights.rstrip(), "dark_orange"))
            console.print(line)


def say_lead(section: Section) -> None:
    """Print what a section says in words."""
    console.print()
    console.print(Text(section.title, "bold"))
    console.print(section.lead, soft_wrap=False, width=_columns())


def say_units(catalogue: Catalogue, units: Sequence[int], examples: int = 3) -> None:
    """Print some units of a catalogue with their strongest examples, the peaks in one column."""
    for unit in units:
        console.print()
        console.print(_heading(catalogue, unit), soft_wrap=False, width=_columns())
        maximum = float(catalogue.statistics.maximum[unit])
        top = catalogue.top
        for number in range(min(examples, top.strength.shape[1])):
            strength = float(top.strength[unit, number])
            if strength > 0:
                ids, strengths = top.tokens[unit, number].tolist(), top.strengths[unit, number]
                tokens = [catalogue.vocabulary[i] if i >= 0 else "" for i in ids]
                above, line = _aligned(tokens, _shares(strengths.tolist(), maximum), _columns())
                console.print(Text(" " * STRENGTH + above, "dark_orange"))
                console.print(Text(f"{strength:>{STRENGTH - 2}.3g}  ", "dim").append(line))


def _heading(catalogue: Catalogue, unit: int) -> Text:
    statistics = catalogue.statistics
    heading = Text(f"{catalogue.kind} {unit}", "bold")
    density, maximum = float(statistics.density[unit]), float(statistics.maximum[unit])
    if not density:
        return heading.append("  never fires", "not bold")
    said = f"  fires on {100 * density:.3g} % of tokens, maximum {maximum:.3g}"
    if catalogue.reading is not None and float(catalogue.reading.score[unit]) >= 0:
        ids = [i for i in catalogue.reading.tokens[unit].tolist() if i >= 0][:5]
        where = "after " if catalogue.reading.previous[unit] else ""
        tokens = " ".join(f"‘{visible(catalogue.vocabulary[i])}’" for i in ids)
        said += f", score {float(catalogue.reading.score[unit]):.2f}: {where}{tokens}"
    return heading.append(said, "not bold")


def _columns() -> int:
    return min(console.width, WIDTH)


def _table(given: sections.Table) -> Table:
    """The table; where it is too wide its headings are folded, then the longest cells."""
    columns = [
        (heading, max([0, *map(cell_len, cells)]))
        for heading, *cells in zip(given.header, *given.rows, strict=True)
    ]
    wide = [max(width, cell_len(heading)) for heading, width in columns]
    narrow = [max([width, *map(cell_len, heading.split())]) for heading, width in columns]
    free = console.width - GAP * len(wide)
    widths = wide if sum(wide) <= free else narrow
    for limit in LONG:
        long = [width for width in widths if width > limit]
        spare = free - sum(widths) + sum(long)
        if spare >= SHORT * len(long):
            break
    share = max(SHORT, spare // max(1, len(long)))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, width in enumerate(widths):
        justify = "left" if number == 0 or width > LONG[0] else "right"
        heading = folded(given.header[number], min(width, share) if width > limit else width)
        table.add_column(Text(heading), justify=justify, no_wrap=True)
    for row in given.rows:
        shown = zip(row, widths, strict=True)
        table.add_row(*(Text(folded(c, share) if width > limit else c) for c, width in shown))
    return table


def folded(text: str, columns: int) -> str:
    """`text` in lines of so many columns, broken between words or, where it lists quoted tokens,
    between these."""
    lines = [""]
    for piece in BETWEEN.split(text) if BETWEEN.search(text) else text.split(" "):
        line = f"{lines[-1]} {piece}" if lines[-1] else piece
        lines[-1:] = [line] if cell_len(line) <= columns or not lines[-1] else [lines[-1], piece]
    return "\n".join(lines)


def _shares(strengths: Sequence[float], strongest: float) -> list[float]:
    return [strength / strongest if strongest > 0 else 0.0 for strength in strengths]


def _height(share: float, text: str) -> str:
    """A block for each column of `text`, none above the space that it begins with."""
    steps = len(HEIGHTS) - 1
    block = HEIGHTS[min(steps, max(1, round(share * steps)))] if share > 0 else " "
    bare = text.lstrip(" ") or text
    return " " * (len(text) - len(bare)) + block * cell_len(bare)


def _lines(text: Coloured, strongest: float, columns: int) -> Iterator[tuple[str, str]]:
    """Lines of a text, each below its heights."""
    heights = line = ""
    shares = _shares(text.strengths, strongest)
    for token, share in zip(text.tokens, shares, strict=True):
        shown = visible(token)
        if line and cell_len(line + shown) > columns:
            yield heights, line
            heights, line, shown = "", "", shown.lstrip(" ")
        heights, line = heights + _height(share, shown), line + shown
        if "\n" in token:
            yield heights, line
            heights = line = ""
    if line:
        yield heights, line


def _aligned(tokens: list[str], shares: list[float], columns: int) -> tuple[str, Text]:
    """Heights and line of an example, its peak at the same column for all."""
    shown = [visible(token) for token in tokens]
    before = int((columns - STRENGTH) * SHARE)
    first = BEFORE - _fitting(shown[:BEFORE][::-1], before)
    last = BEFORE + _fitting(shown[BEFORE:], columns - STRENGTH - before)
    pad = " " * (before - cell_len("".join(shown[first:BEFORE])))
    heights = "".join(map(_height, shares[first:last], shown[first:last]))
    line = Text(pad + "".join(shown[first:BEFORE]))
    line.append(shown[BEFORE], "bold").append("".join(shown[BEFORE + 1 : last]))
    return (pad + heights).rstrip(), line


def _fitting(shown: list[str], columns: int) -> int:
    """How many of the first texts fit into so many columns."""
    return sum(width <= columns for width in accumulate(map(cell_len, shown)))
