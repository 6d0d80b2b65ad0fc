"""What the HTML pages share: templates, with data and plotly.js inside the one file."""

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def rendered(template: str, *, figures: bool, **values: object) -> str:
    """A page from its template; with plotly.js in it if there are figures."""
    # imported late: train.py needs none of them
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    def data(value: Any) -> Markup:
        """JSON for a <script type="application/json">; no text in it can end the element."""
        return Markup(to_json_plotly(value))

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
        plotly=Markup(get_plotlyjs()) if figures else "",
        **values,
    )
