"""Plotly figures as plain dicts, all in one style: {"data": [traces], "layout": {...}}."""

from typing import Any

from torch import Tensor

# Told apart by colour-blind readers.
COLOURS = ("#3b82c4", "#d9822b", "#2a9d74", "#b65fa6", "#c9504a", "#8a8a3c")
GREY = "#8b909a"
ALIKE = 1e-4  # of their size; so close are values that are meant to be equal
FEW = 11  # bins


def layout(x: str, y: str, **more: Any) -> dict:
    """A layout with titles of the axes; `more` are entries of its own, xaxis, yaxis and legend
    merged."""
    merged = {
        "xaxis": {"title": {"text": x}, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": y}, "zeroline": False, "automargin": True},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }
    return {
        "autosize": True,
        "margin": {"l": 62, "r": 24, "t": 10, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#1f2328", "font": {"color": "#ffffff"}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY},
        **{name: entry | more.pop(name, {}) for name, entry in merged.items()},
        **more,
    }


def line(x: list[float], y: list[float], name: str, number: int = 0, **more: Any) -> dict:
    """A trace in the colour of its number."""
    colour = COLOURS[number % len(COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 2},
    } | more


def bars(x: list, y: list[float], number: int = 0, **more: Any) -> dict:
    """A trace of bars in the colour of its number."""
    return {
        "type": "bar",
        "x": x,
        "y": y,
        "marker": {"color": COLOURS[number % len(COLOURS)]},
        "showlegend": False,
    } | more


def histogram(values: Tensor, x: str, y: str = "features", bins: int = 60) -> dict:
    """How many of finite `values` [n] lie where; counted here, so that a page stays small."""
    values = values[values.isfinite()].double().cpu()
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    middle, size = (low + high) / 2, max(abs(low), abs(high))
    if high - low <= ALIKE * size:  # one broad bar: those of rounding errors cannot be seen
        low, high, bins = middle - (size or 1) / 2, middle + (size or 1) / 2, FEW
    counts = values.histc(bins, low, high)
    width = (high - low) / bins
    middles = [low + (i + 0.5) * width for i in range(bins)]
    trace = bars(rounded(middles, 9), counts.int().tolist(), width=width)
    return {"data": [trace], "layout": layout(x, y, bargap=0)}


def rounded(values: list[float] | Tensor, digits: int = 5) -> list[float]:
    """To as many significant digits as a figure shows."""
    values = values.tolist() if isinstance(values, Tensor) else values
    return [float(f"{value:.{digits}g}") for value in values]


def upright(x: float, name: str, left: bool = False) -> dict:
    """What a layout takes to mark a place on the x axis: a dashed line, its name to the right or
    left of it."""
    return {
        "type": "line",
        "line": {"color": GREY, "dash": "dot"},
        "label": {
            "text": name,
            "textposition": "end",
            "textangle": 0,
            "xanchor": "right" if left else "left",
            "yanchor": "top",
            "padding": 4,
            "font": {"color": GREY},
        },
        **{"x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1},
    }
