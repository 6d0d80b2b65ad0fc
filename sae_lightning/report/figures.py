"""Plotly figures in one style."""

import html
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sae_lightning.report.noise import Estimates, differ_significantly
from sae_lightning.terminal import make_visible

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

# Distinguishable to the colour-blind.
COLOURS = ("#3b82c4", "#d9822b", "#2a9d74", "#b65fa6", "#c9504a", "#8a8a3c")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "x")
GREY = "#8b909a"
TEMPLATE = {
    "layout": {
        "autosize": True,
        "colorway": COLOURS,
        "margin": {"l": 62, "r": 24, "t": 10, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#1f2328", "font": {"color": "#ffffff"}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"zeroline": False, "automargin": True},
        "yaxis": {"zeroline": False, "automargin": True},
        "shapedefaults": {"line": {"color": GREY, "dash": "dot"}},
        "annotationdefaults": {"font": {"color": GREY}},
    }
}
SAME_VALUE = 1e-4  # values count as equal if their range / the largest |value| is at most this
SINGLE_VALUE_BINS = 11  # bins of a histogram of equal values
MAX_LABELLED = 12  # points with labels; labels of more points would overlap
LOG_AXIS_RATIO = 8  # largest / smallest L0 from which the axis is logarithmic


def make_figure(x: str, y: str, **layout: Any) -> "Figure":
    """Create an empty figure with axis titles `x` and `y` and further layout entries."""
    from plotly.graph_objects import Figure  # imported late: train.py does not need it

    titles = {"xaxis_title_text": x, "yaxis_title_text": y}
    return Figure(layout={"template": TEMPLATE}).update_layout(**titles, **layout)


def plot_histogram(values: Tensor, x: str, y: str = "features", bins: int = 60) -> "Figure":
    """Draw a histogram of the finite `values` [n], empty if there are none. Plotly gets the counts,
    not the values, which keeps the page small."""
    values = values[values.isfinite()].double().cpu()
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if high - low <= SAME_VALUE * largest:  # one wide bar in the middle: narrow ones are invisible
        middle, half = (low + high) / 2, (largest or 1) / 2
        low, high, bins = middle - half, middle + half, SINGLE_VALUE_BINS
    width = (high - low) / bins
    middles = low + (np.arange(bins) + 0.5) * width
    counts = values.histc(bins, low, high).int().numpy()
    return make_figure(x, y, bargap=0).add_bar(x=middles, y=counts, width=width)


def find_pareto_front(l0: Estimates, quality: Estimates) -> np.ndarray:
    """Find which points are on the Pareto front, bool [n]: no other point is better in L0 (lower)
    or quality (higher) without being worse in the other. Differences within the noise do not count.

    Equal points are all on the front; points with a NaN or an infinity never are.
    """
    finite = np.isfinite(l0.mean) & np.isfinite(quality.mean)
    l0, quality = l0.pick(finite), quality.pick(finite)
    sparser = differ_significantly(l0.as_column(), l0)
    sparser &= l0.mean[:, None] < l0.mean
    higher = differ_significantly(quality.as_column(), quality)
    higher &= quality.mean[:, None] > quality.mean
    better = sparser | higher  # [i, j]: i is better than j in L0, in quality, or in both
    front = np.zeros_like(finite)
    # j is off the front if some i is better in L0 or quality, and j is better than i in neither
    front[finite] = ~(better & ~better.T).any(axis=0)
    return front


def plot_tradeoff(points: "pd.DataFrame", y: str, grouping: str | None = None) -> "Figure | None":
    """Plot the column `quality`, with axis title `y`, against L0. The Pareto front of trained SAEs
    (all but controls) is a line, that of controls a dotted line. With several seeds, points are
    means, and error bars and the bands of fronts show the spread. None without finite points.

    Columns of `points`: `l0`, `quality` (higher is better), `l0_spread` and `spread` (their
    standard deviations over seeds), `seeds` (number of runs), `control` ("" for a trained SAE),
    `group` ("" if there are no groups), `label` (distinguishes the points of a group) and `details`
    (lines of text shown on hover). `grouping` names the setting whose values are the groups.
    """
    points = points[np.isfinite(points[["l0", "quality"]]).all(axis=1)]
    if points.empty:
        return None
    figure = make_figure(
        "L0 (active features per token)",
        y,
        legend_title={"text": _escape(_shorten(grouping or "")), "font": {"size": 13}},
        xaxis=_make_l0_axis(points.l0.min(), points.l0.max()),
    )
    trained, controls = points[points.control == ""], points[points.control != ""]
    # order in the legend: trained SAEs 1, their front 2, controls 3, their front 4
    for candidates, name, dash, legend_rank in (
        (controls, "front of controls", "dot", 4),
        (trained, "front of trained SAEs", "solid", 2),
    ):
        if len(candidates):
            style = {"name": name, "legendrank": legend_rank, "showlegend": len(controls) > 0}
            _draw_front(figure, candidates, dash, style)
    for i, (name, group) in enumerate(controls.groupby("control")):
        symbol = f"{SHAPES[i % len(SHAPES)]}-open"
        marker = {"size": 8, "color": GREY, "symbol": symbol}
        _draw_points(figure, group, name, mode="markers", marker=marker, legendrank=3)
    _draw_trained(figure, trained.assign(front=_is_on_front(trained)))
    return figure


def _draw_trained(figure: "Figure", trained: "pd.DataFrame") -> None:
    """Draw trained SAEs in the colour and shape of their group; those off the front are pale."""
    for i, (name, group) in enumerate(trained.groupby("group", sort=False)):
        _draw_points(
            figure,
            group,
            name,
            mode="markers+text" if len(trained) <= MAX_LABELLED else "markers",
            text=[_escape(_shorten(label)) for label in group.label],
            textposition=np.where(group.front, "top left", "bottom right"),  # away from the line
            marker={
                "size": 10,
                "color": COLOURS[i % len(COLOURS)],
                "symbol": SHAPES[i % len(SHAPES)],
                "opacity": np.where(group.front, 1, 0.5),
            },
            error_x=_make_bars(group.l0_spread),
            error_y=_make_bars(group.spread),
            legendrank=1,
        )


def _is_on_front(points: "pd.DataFrame") -> np.ndarray:
    """Whether each of `points` is on their Pareto front, bool [n]."""
    l0 = Estimates(*points[["l0", "l0_spread", "seeds"]].to_numpy(float).T)
    quality = Estimates(*points[["quality", "spread", "seeds"]].to_numpy(float).T)
    return find_pareto_front(l0, quality)


def _draw_front(figure: "Figure", points: "pd.DataFrame", dash: str, style: dict) -> None:
    """Draw the Pareto front of `points` as a line, in a band of one spread on each side."""
    front = points[_is_on_front(points)].sort_values(["l0", "quality"])
    if front.spread.notna().any():
        spread = front.spread.fillna(0)
        figure.add_scatter(
            x=[*front.l0, *front.l0[::-1]],
            y=[*(front.quality + spread), *(front.quality - spread)[::-1]],
            fill="toself",
            fillcolor="rgba(139, 144, 154, 0.18)",
            mode="none",
            hoverinfo="skip",
            showlegend=False,
        )
    figure.add_scatter(
        x=front.l0,
        y=front.quality,
        mode="lines",
        line={"color": GREY, "width": 1.5, "dash": dash},
        hoverinfo="skip",
        **style,
    )


def _draw_points(figure: "Figure", group: "pd.DataFrame", name: str, **style: Any) -> None:
    """Draw the points of a group; the legend shows its `name` unless that is empty."""
    figure.add_scatter(
        name=_escape(name),
        showlegend=name != "",
        x=group.l0,
        y=group.quality,
        cliponaxis=False,
        hovertext=["<br>".join(map(_escape, details)) for details in group.details],
        hovertemplate="%{hovertext}<extra></extra>",
        **style,
    )


def _make_bars(spread: "pd.Series") -> dict[str, Any] | None:
    """Make error bars as long as the spreads; None if no point has one."""
    if spread.isna().all():
        return None
    return {"array": spread.fillna(0), "thickness": 1, "width": 3}


def _shorten(label: str) -> str:
    """Cut a label to 24 characters."""
    return label if len(label) <= 24 else label[:23] + "…"


def _escape(text: str) -> str:
    """Escape a text for plotly, which renders texts as HTML."""
    return html.escape(make_visible(text), quote=False)


def _make_l0_axis(low: float, high: float) -> dict[str, Any]:
    """Layout of the L0 axis: padded for labels, logarithmic if values span LOG_AXIS_RATIO."""
    is_log = low > 0 and high / low >= LOG_AXIS_RATIO
    first, last = (math.log10(low), math.log10(high)) if is_log else (low, high)
    pad = 0.1 * ((last - first) or abs(last) or 1.0)
    axis = {"range": [first - pad, last + pad]}
    if is_log:
        axis |= {"type": "log", "tickformat": ",", "minorloglabels": "complete"}
    if is_log and last - first >= 3:
        axis["dtick"] = 1  # one label per decade
    return axis
