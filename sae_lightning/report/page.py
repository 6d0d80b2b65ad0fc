"""HTML pages that load nothing from the network, and the analysis page."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae_lightning.files import write_atomically
from sae_lightning.report.annotated import AnnotatedText
from sae_lightning.report.block_scripts import remove_old_blocks, write_blocks
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.page_data import PageData, pack_catalogues
from sae_lightning.report.section import ResultTable, Section, show_token, split_quoted
from sae_lightning.terminal import make_visible

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
# A cell from its start to the end of its first number; group 1 is the number.
NUMBER = re.compile(r"^[^\w.]*?([-−+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?)", re.IGNORECASE)

MAX_ONE_LINE = 40  # characters; a longer cell of a table may wrap
# Blocks of more unpacked bytes are files beside the page; packed, blocks take about a third.
MAX_EMBEDDED_BYTES = 1 << 26


def render_template(template: str, *, figures: bool, **values: object) -> str:
    """Render a template with `values`; with `figures`, plotly.js is embedded."""
    # imported late: train.py needs none of them
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # names and metadata may come from untrusted files; a Markup is our own, and kept as it is
        finalize=lambda value: make_visible(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(
        asset=lambda name: Markup((TEMPLATES / name).read_text("utf8")),
        # to_json_plotly escapes "<", so that no text in the data can end the <script> around it
        data=lambda value: Markup(to_json_plotly(value)),
        plotly=Markup(get_plotlyjs()) if figures else "",
        **values,
    )


class AnalysisPage(NamedTuple):
    """The content of an analysis page."""

    title: str
    facts: dict[str, str]
    """Shown below the title."""
    sections: Sequence[Section]
    """Results; a link to a `Section.part` shows it in place of the browser of features."""
    catalogues: Sequence[Catalogue] = ()
    commands: Sequence[str] = ()
    """Command lines to paste, shown at the end."""
    files: Sequence[str] = ()
    """Names of files in the page's folder."""
    annotated: AnnotatedText | None = None
    """The user's text, annotated with features; shown above the browser of features."""


def write_page(path: Path, page: AnalysisPage) -> None:
    """Write `page` to `path`. Blocks of more than MAX_EMBEDDED_BYTES go into a folder beside it."""
    page_data = pack_catalogues(page.catalogues) if page.catalogues else None
    if page_data and page_data.blocks.size > MAX_EMBEDDED_BYTES:
        page_data.index["folder"] = write_blocks(path, page_data.blocks)
        page_data = page_data._replace(blocks={})
    text = render_page(page, page_data)
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf8")
    remove_old_blocks(path, kept=page_data and page_data.index.get("folder"))


def render_page(page: AnalysisPage, page_data: PageData | None) -> str:
    """The HTML of `page`; `page_data`: its catalogues, packed."""
    return render_template(
        "analysis.html",
        figures=any(section.figures for section in page.sections),
        title=page.title,
        facts=page.facts,
        kinds=[catalogue.kind for catalogue in page.catalogues],
        page_data=page_data,
        parts=_group_by_part(page.sections),
        commands=page.commands,
        files=page.files,
        annotated=page.annotated,
        split_quoted=split_quoted,
        break_lines=_break_lines,
        zip=zip,
        find_long_columns=find_long_columns,
        make_sort_value=make_sort_value,
    )


def _break_lines(token: str) -> "Markup":
    """The token as HTML, with a line break after each ↵, which stands for a newline."""
    from markupsafe import escape

    return escape(show_token(token)).replace("↵", "↵\n")


def _group_by_part(sections: Sequence[Section]) -> dict[str, tuple[str, list[Section]]]:
    """Group sections by part of the page: anchor -> (name of the part, its sections), in order."""
    parts: dict[str, tuple[str, list[Section]]] = {}
    for section in sections:
        name = section.part or section.title
        anchor = "part-" + re.sub(r"\W+", "-", name.lower()).strip("-")
        parts.setdefault(anchor, (name, []))[1].append(section)
    return parts


def find_long_columns(table: ResultTable) -> set[int]:
    """Indices of the columns with a cell longer than MAX_ONE_LINE, which may wrap."""
    return {
        column for row in table.rows for column, cell in enumerate(row) if len(cell) > MAX_ONE_LINE
    }


def make_sort_value(cell: str, *, is_word: bool) -> float | str:
    """The sort key of a table's cell: its first number, or "" if it has none. In a column of words
    (`is_word`): the number if the whole cell is one, else the cell."""
    match = NUMBER.match(cell)
    if match is None or (is_word and match.group() != cell):
        return cell if is_word else ""
    return float(match.group(1).replace(",", "").replace("−", "-"))
