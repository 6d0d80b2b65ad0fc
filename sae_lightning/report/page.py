"""What analysis found as one HTML page that needs nothing from the network."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.markup import rendered
from sae_lightning.report.page_data import page_data
from sae_lightning.report.section import Coloured, Section, Table, visible

# The first number of a cell, with what may stand before it.
NUMBER = re.compile(r"^[^\w.]*?([-−+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?)", re.IGNORECASE)

LONG = 40  # characters


class Token(NamedTuple):
    """A token of a text as the template shows it."""

    text: str
    """As it reads."""
    share: float
    """Of the strongest of its section, from -1 to 1; 0 has no colour."""
    strength: str
    """For the pointer."""


def page(
    title: str,
    facts: dict[str, str],
    sections: Sequence[Section],
    catalogues: Sequence[Catalogue] = (),
    commands: Sequence[str] = (),
) -> str:
    """The page: facts below the title, a browser of the catalogues' units, then the sections.

    `commands` are shown at its end, to be pasted.
    """
    return rendered(
        "analysis.html",
        figures=any(section.figures for section in sections),
        title=title,
        facts=facts,
        kinds=[catalogue.kind for catalogue in catalogues],
        units=page_data(catalogues) if catalogues else None,
        parts=_parts(sections),
        commands=commands,
        coloured=coloured,
        wordy=wordy,
        sortable=sortable,
    )


def _parts(sections: Sequence[Section]) -> dict[str, tuple[str, list[Section]]]:
    """Anchor -> name of the part and its sections, in the order in which parts begin."""
    parts: dict[str, tuple[str, list[Section]]] = {}
    for section in sections:
        name = section.part or section.title
        anchor = "part-" + re.sub(r"\W+", "-", name.lower()).strip("-")
        parts.setdefault(anchor, (name, []))[1].append(section)
    return parts


def coloured(texts: Sequence[Coloured]) -> list[tuple[str, list[Token]]]:
    """Caption and tokens of each text; colours can be compared between them."""
    strengths = [abs(strength) for text in texts for strength in text.strengths]
    strongest = max(strengths, default=0) or 1
    return [
        (
            text.caption,
            [
                Token(_broken(token), round(strength / strongest, 3), f"{strength:.3g}")
                for token, strength in zip(text.tokens, text.strengths, strict=True)
            ],
        )
        for text in texts
    ]


def _broken(token: str) -> str:
    """Line breaks as symbols and as breaks."""
    return visible(token).replace("↵", "↵\n")


def wordy(table: Table) -> set[int]:
    """Numbers of the columns with cells too long to stand on one line."""
    return {number for row in table.rows for number, cell in enumerate(row) if len(cell) > LONG}


def sortable(cell: str, *, word: bool) -> float | str:
    """What a table's cell is sorted by: its number; the cell itself where it holds a word."""
    found = NUMBER.match(cell)
    if found is None or (word and found.group() != cell):
        return cell if word else ""
    return float(found.group(1).replace(",", "").replace("−", "-"))
