"""What the HTML pages share: templates, data and plotly figures, all inside the one file."""

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
BUTTONS = ["toImage", "zoom2d", "pan2d", "resetScale2d"]  # no others: one of them uploads
CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtons": [BUTTONS]}


def rendered(template: str, *, figures: bool, **values: object) -> str:
    """A page from its template; with plotly.js in it if there are figures."""
    # imported late: train.py needs neither
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        asset=lambda name: Markup((TEMPLATES / name).read_text("utf8")),
        data=data,
        plotly=_plotly() if figures else "",
        **values,
    )


def data(value: Any) -> str:
    """JSON for a <script type="application/json">; no text in it can end the element."""
    from markupsafe import Markup
    from plotly.io.json import to_json_plotly

    return Markup(to_json_plotly(value))


def figure(given: dict[str, Any]) -> dict[str, Any]:
    """A plotly figure as templates/plots.js draws it."""
    return given | {"config": CONFIG}


def _plotly() -> str:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
