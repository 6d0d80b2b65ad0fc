"""Plots EV and CE recovered against L0: a colour for each architecture, a marker for each tool."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

COLOURS = {  # Okabe and Ito's palette, safe for colour-blind readers
    "relu": "#0072b2",
    "topk": "#e69f00",
    "batch_topk": "#009e73",
    "jumprelu": "#cc79a7",
    "gated": "#56b4e9",
    "matryoshka": "#d55e00",
}
MARKERS = ("o", "s", "^")  # sae_lightning, then other tools
MEASURES = {
    "explained_variance": "explained variance",
    "ce_recovered": "cross-entropy recovered",
}


def draw(results: list[dict[str, Any]], file: Path) -> Path:
    """Draw all results into the PNG `file`; SAEs trained as documented have hollow markers."""
    tools = sorted({r["tool"] for r in results}, key=lambda t: (t != "sae_lightning", t))
    versions = {r["tool"]: r["version"] for r in results}
    names = [name for name in COLOURS if any(r["architecture"] == name for r in results)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), dpi=150, layout="constrained")
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for name in names:
            for tool, marker in zip(tools, MARKERS, strict=False):
                selected = [r for r in results if (r["architecture"], r["tool"]) == (name, tool)]
                _scatter(axis, selected, measure, COLOURS[name], marker)
        axis.set(xscale="log", xlabel="L0 (active features per token)", ylabel=title)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(color="#e3e3e3", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    grey = {"color": "#555555", "linestyle": "none", "markersize": 8}
    handles = [Line2D([], [], color=COLOURS[name], linewidth=5, label=name) for name in names]
    handles += [
        Line2D([], [], marker=marker, label=f"{tool} {versions[tool]}".strip(), **grey)
        for tool, marker in zip(tools, MARKERS, strict=False)
    ]
    if any(_is_documented(r) for r in results):
        handles.append(Line2D([], [], marker="s", mfc="white", label="as documented", **grey))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.savefig(file)
    plt.close(figure)
    return file


def _scatter(axis, results: list[dict[str, Any]], measure: str, colour: str, marker: str) -> None:
    """Draw the points of one architecture and tool, joined in the order of L0."""
    joined = sorted((r["l0"], r[measure]) for r in results if not _is_documented(r))
    alone = [(r["l0"], r[measure]) for r in results if _is_documented(r)]
    style = {"color": colour, "marker": marker, "markersize": 8, "linewidth": 1.3}
    style |= {"linestyle": "-" if marker == "o" else "--"}
    if joined:
        axis.plot(*zip(*joined, strict=True), **style, markeredgecolor="white")
    if alone:
        axis.plot(*zip(*alone, strict=True), **style | {"linestyle": "none"}, mfc="white")


def _is_documented(result: dict[str, Any]) -> bool:
    return "documented" in result["label"]
