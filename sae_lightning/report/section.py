"""What a task found, in a form that a terminal and a page can both show."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# What would move the cursor or cannot be seen, as a symbol that is written instead.
SYMBOLS = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵", ord("\t"): "⇥"}


def visible(token: str) -> str:
    """The token on one line: line breaks, tabs and other control characters as symbols."""
    return token.translate(SYMBOLS)


class Coloured(NamedTuple):
    """Text whose tokens carry strengths."""

    caption: str
    """What it is an example of."""
    tokens: list[str]
    """As they read, with their spaces."""
    strengths: list[float]
    """One for each token; 0 where there is none."""


class Table(NamedTuple):
    """Numbers in rows."""

    header: list[str]
    """Names of the columns; the first holds words, the others numbers."""
    rows: list[list[str]]
    """Ready to read."""


class Section(NamedTuple):
    """One result: a claim in words, with the numbers and pictures that bear it out."""

    title: str
    """A few words."""
    lead: str
    """What was found, in a sentence or two."""
    rows: dict[str, str] = {}
    """Numbers by name, ready to read."""
    table: Table | None = None
    """More of them."""
    texts: list[Coloured] = []
    """Text that shows it."""
    figures: dict[str, "Figure"] = {}
    """By caption."""
    part: str = ""
    """Part of a larger page that it belongs to; its title unless given."""

    @property
    def strongest(self) -> float:
        """Greatest size of a strength in `texts`, which makes these comparable; 1 without any."""
        return max((abs(s) for text in self.texts for s in text.strengths), default=0) or 1
