"""What a task found, in a form that a terminal and a page can both show."""

import re
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

from sae_lightning.terminal import make_visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BETWEEN_QUOTED = re.compile(r"(?<=['’]) (?=['‘])")  # tokens in quotes


def show_token(token: str) -> str:
    """The token as it is shown, apart from its neighbours: `make_visible`, and an accent that
    belongs to the token before on a circle of its own."""
    alone = unicodedata.category(token[:1] or " ").startswith("M")
    return "◌" * alone + make_visible(token)


def split_quoted(cell: str) -> list[str]:
    """A table's cell in the parts that are shown apart: its tokens in quotes, or all of it."""
    return BETWEEN_QUOTED.split(cell)


class ColouredText(NamedTuple):
    """Text whose tokens carry strengths."""

    caption: str
    """What it is an example of."""
    tokens: list[str]
    """As they read, with their spaces."""
    strengths: list[float]
    """One for each token; 0 where there is none."""


class ResultTable(NamedTuple):
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
    table: ResultTable | None = None
    """More of them."""
    texts: list[ColouredText] = []
    """Text that shows it."""
    figures: dict[str, "Figure"] = {}
    """By caption."""
    part: str = ""
    """Part of a larger page that it belongs to; its title unless given."""

    @property
    def max_strength(self) -> float:
        """Greatest size of a strength in `texts`, which makes these comparable; 1 without any."""
        return max((abs(s) for text in self.texts for s in text.strengths), default=0) or 1
