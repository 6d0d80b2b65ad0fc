"""A task's results in a form that both the terminal and the page can show."""

import re
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

from sae_lightning.terminal import make_visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SPACE_BETWEEN_QUOTED = re.compile(r"(?<=['’]) (?=['‘])")


def show_token(token: str) -> str:
    """Make a token readable on its own: control characters become visible, and a leading combining
    accent gets a dotted circle to stand on."""
    # " " if the token is empty: `category` needs a character
    is_accent = unicodedata.category(token[:1] or " ").startswith("M")
    return ("◌" if is_accent else "") + make_visible(token)


def split_quoted(cell: str) -> list[str]:
    """Split a table's cell into its quoted tokens; a cell of anything else stays whole."""
    return SPACE_BETWEEN_QUOTED.split(cell)


class ColouredText(NamedTuple):
    """A text whose tokens are coloured by strength."""

    caption: str
    """What the text is an example of."""
    tokens: list[str]
    """Decoded tokens with their leading spaces."""
    strengths: list[float]
    """Strength of each token. 0 is not coloured; a value below 0 has another colour."""


class ResultTable(NamedTuple):
    """A table of formatted numbers and words."""

    header: list[str]
    """Names of the columns; the first is sorted as words, the others by their first number."""
    rows: list[list[str]]


class Section(NamedTuple):
    """A result: what it says in words, and the numbers, texts and figures that support it."""

    title: str
    lead: str
    """What the result says, in a few sentences."""
    numbers: dict[str, str] = {}
    """Label -> what stands beside it: a formatted number, words or a sentence."""
    table: ResultTable | None = None
    texts: list[ColouredText] = []
    figures: dict[str, "Figure"] = {}
    """Caption -> figure; shown on the page only."""
    part: str = ""
    """Name of the part of the page that the section is in; if empty, the section is a part alone,
    named after its title."""

    @property
    def max_strength(self) -> float:
        """Largest absolute value of `strengths`, which gets the full colour; 1 if all are 0."""
        return max((abs(s) for text in self.texts for s in text.strengths), default=0) or 1
