"""Sparsity against quality: which SAEs of a sweep no other beats, and the plot that shows it."""

import html
import math
from typing import NamedTuple

from sae_lightning.report.figures import COLOURS, GREY, layout

LABELLED = 12  # points; with more, labels cover one another and the pointer has to do
WIDE = 8  # largest L0 over smallest, from where the axis is logarithmic
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "x")  # one for each group


class Point(NamedTuple):
    """One SAE in a plot."""

    l0: float
    """Active features per token: the less the better."""
    quality: float
    """The more the better."""
    label: str
    """What tells it from others of its group."""
    group: str
    """The value that its colour stands for; "" where all are of one kind."""
    details: str
    """What the pointer shows, one fact a line."""


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (l0, quality) that none beats in one without losing in the other.

    In order of l0. Equal points are on the front together; those with a nan are not on it.
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    front = [i for i in finite if not any(_beats(points[j], points[i]) for j in finite)]
    return sorted(front, key=lambda i: points[i])


def _beats(this: tuple[float, float], other: tuple[float, float]) -> bool:
    return this != other and this[0] <= other[0] and this[1] >= other[1]


def tradeoff(points: list[Point], quality: str, grouping: str | None = None) -> dict | None:
    """A figure for plotly: L0 against `quality`, the front as a line; None without points.

    `grouping` names the setting whose values are the points' groups.
    """
    points = [p for p in points if math.isfinite(p.l0) and math.isfinite(p.quality)]
    if not points:
        return None
    front = [points[i] for i in pareto([(p.l0, p.quality) for p in points])]
    groups = list(dict.fromkeys(p.group for p in points))
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [p.l0 for p in front],
        "y": [p.quality for p in front],
        "line": {"color": GREY, "width": 1.5},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    traces = [
        _trace([p for p in points if p.group == group], group, number, front, len(points))
        for number, group in enumerate(groups)
    ]
    return {"data": [line, *traces], "layout": _layout(points, quality, grouping)}


def _trace(points: list[Point], group: str, number: int, front: list[Point], total: int) -> dict:
    return {
        "type": "scatter",
        "mode": "markers+text" if total <= LABELLED else "markers",
        "name": _escaped(group),
        "showlegend": group != "",
        "x": [p.l0 for p in points],
        "y": [p.quality for p in points],
        "text": [_escaped(_short(p.label)) for p in points],
        # away from the line
        "textposition": ["top left" if p in front else "bottom right" for p in points],
        "cliponaxis": False,
        "hovertext": [_escaped(p.details).replace("\n", "<br>") for p in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "size": 10,
            "color": COLOURS[number % len(COLOURS)],
            "symbol": SHAPES[number % len(SHAPES)],
            "opacity": [1.0 if p in front else 0.5 for p in points],
        },
    }


def _short(label: str) -> str:
    return label if len(label) <= 24 else label[:23] + "…"


def _escaped(text: str) -> str:
    """plotly takes its texts for HTML."""
    return html.escape(text, quote=False)


def _layout(points: list[Point], quality: str, grouping: str | None) -> dict:
    return layout(
        "L0 (active features per token)",
        quality,
        legend={"title": {"text": _escaped(_short(grouping or "")), "font": {"size": 13}}},
        xaxis=_l0_axis([p.l0 for p in points]),
    )


def _l0_axis(values: list[float]) -> dict:
    """Room for labels at both ends; logarithmic where the values span much."""
    low, high = min(values), max(values)
    if low <= 0 or high / low < WIDE:
        span = (high - low) or abs(high) or 1.0
        return {"range": [low - 0.1 * span, high + 0.1 * span]}
    first, last = math.log10(low), math.log10(high)
    pad = last - first
    exponents = range(math.floor(first) - 1, math.ceil(last) + 2)
    # of each decade 1, 2 and 5, written out: plotly writes 2 and 5 without their zeros
    steps = (1, 2, 5) if pad < 3 else (1,)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return {
        "type": "log",
        "range": [first - 0.1 * pad, last + 0.1 * pad],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" if tick < 1e4 else f"{tick:,.0f}" for tick in ticks],
    }
