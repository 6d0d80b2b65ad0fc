"""The Pareto front on points worked out by hand, and the plot that draws it."""

import math
import random
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest

from sae_lightning.report.figures import MAX_LABELLED, find_pareto_front, plot_tradeoff
from sae_lightning.report.noise import Estimates

NAN = math.nan


def on_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (l0, quality) on the front."""
    l0, quality = (single_runs(point[i] for point in points) for i in (0, 1))
    return [*np.flatnonzero(find_pareto_front(l0, quality))]


def single_runs(values: Iterable[float]) -> Estimates:
    means = np.array([*values], dtype=float)
    return Estimates(means, np.full_like(means, NAN), np.ones_like(means))


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(10, 0.5)], [0]),
        # (15, 0.4) loses to (10, 0.5) in both; (30, 0.7) to (20, 0.7) in L0
        ([(10, 0.5), (20, 0.7), (15, 0.4), (30, 0.7), (40, 0.9)], [0, 1, 4]),
        ([(40, 0.9), (10, 0.5), (20, 0.7)], [0, 1, 2]),
        # equal L0: the better quality; equal quality: the smaller L0
        ([(10, 0.5), (10, 0.6)], [1]),
        ([(10, 0.5), (9, 0.5)], [1]),
        # equal points are not better than one another
        ([(10, 0.5), (10, 0.5)], [0, 1]),
        ([(10, 0.5), (10, 0.5), (9, 0.6)], [2]),
        # without a number there is nothing to compare
        ([(NAN, 0.9), (10, 0.5), (5, NAN), (math.inf, 1.0)], [1]),
        ([(NAN, NAN)], []),
        # no SAE at all reconstructs nothing with L0 = 0
        ([(0, -0.3), (50, 0.8)], [0, 1]),
    ],
)
def test_the_front_is_what_no_other_point_beats(points, front):
    assert on_front(points) == front


def test_every_point_off_the_front_is_beaten_by_one_on_it():
    rng = random.Random(0)
    points = [(l0, rng.randrange(l0 + 1)) for l0 in rng.choices(range(20), k=60)]
    front = sorted(on_front(points), key=points.__getitem__)
    assert 1 < len(front) < len(points)
    l0, quality = zip(*(points[i] for i in front), strict=True)
    assert list(l0) == sorted(l0)
    assert list(quality) == sorted(quality), "more active features have to pay off"
    for i in set(range(len(points))) - set(front):
        assert any(
            points[j] != points[i] and points[j][0] <= points[i][0] and points[j][1] >= points[i][1]
            for j in front
        )


def drawn(*points: tuple, grouping: str | None = None):
    """Plot points (l0, quality, label, group)."""
    padded = [[*point, *("", "")][:4] for point in points]
    frame = pd.DataFrame(padded, columns=["l0", "quality", "label", "group"])
    frame = frame.astype({"l0": float, "quality": float})
    details = [[label, f"L0: {l0:g}"] for l0, label in zip(frame.l0, frame.label, strict=True)]
    frame = frame.assign(details=details, control="", seeds=1, l0_spread=NAN, spread=NAN)
    return plot_tradeoff(frame, "EV", grouping)


def test_the_line_joins_the_front_in_order_of_l0_and_the_rest_is_pale():
    line, *traces = drawn((30, 0.7), (10, 0.5), (12, 0.4)).data
    assert ([*line.x], [*line.y]) == ([10, 30], [0.5, 0.7])
    (trace,) = traces
    opacity = dict(zip(trace.x, trace.marker.opacity, strict=True))
    assert opacity[10] == opacity[30] == 1 > opacity[12]


def test_points_without_a_number_are_not_drawn():
    assert drawn() is None
    assert drawn((NAN, 0.5), (3, NAN)) is None
    _, trace = drawn((NAN, 0.5), (3, 0.5)).data
    assert [*trace.x] == [3]


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([10, 100], True), ([10, 30], False), ([0, 100], False), ([50], False)],
)
def test_the_axis_is_logarithmic_where_l0_spans_much(values, logarithmic):
    axis = drawn(*((l0, 0.5) for l0 in values)).layout.xaxis
    assert (axis.type == "log") == logarithmic
    low, high = axis.range
    ends = [math.log10(v) for v in values] if logarithmic else values
    assert low < min(ends) <= max(ends) < high


def test_few_points_are_labelled_and_many_are_not():
    for count, mode in ((MAX_LABELLED, "markers+text"), (MAX_LABELLED + 1, "markers")):
        _, trace = drawn(*((l0 + 1, 0.5, "x") for l0 in range(count))).data
        assert trace.mode == mode


def test_groups_have_their_own_colour_and_shape():
    points = (1, 0.1, "", "relu"), (2, 0.2, "", "dense"), (3, 0.3, "", "relu")
    figure = drawn(*points, grouping="model")
    _, relu, dense = figure.data
    assert (relu.name, [*relu.x], dense.name, [*dense.x]) == ("relu", [1, 3], "dense", [2])
    assert relu.marker.color != dense.marker.color
    assert relu.marker.symbol != dense.marker.symbol
    assert figure.layout.legend.title.text == "model"


def test_names_are_text_and_not_markup():
    figure = drawn((1, 0.1, "<b>a&b</b>", "<i>"), grouping="<u>")
    trace = figure.data[1]
    assert trace.text == ("&lt;b&gt;a&amp;b&lt;/b&gt;",)
    assert trace.hovertext == ("&lt;b&gt;a&amp;b&lt;/b&gt;<br>L0: 1",)
    assert trace.name == "&lt;i&gt;"
    assert figure.layout.legend.title.text == "&lt;u&gt;"


def test_over_seeds_the_front_is_a_band_and_controls_have_one_of_their_own():
    points = pd.DataFrame({"l0": [10.0, 30.0, 20.0], "quality": [0.5, 0.7, 0.4]})
    points = points.assign(l0_spread=[1.0, 2.0, NAN], spread=[0.01, 0.02, NAN], seeds=[3, 3, 1])
    points = points.assign(control=["", "", "pca"], group="trained", label="", details=[[]] * 3)
    control_front, band, front, control, trained = plot_tradeoff(points, "EV").data
    assert ([*front.x], [*control_front.x], [*control.x]) == ([10, 30], [20], [20])
    assert [*band.x] == [10, 30, 30, 10]
    assert [*band.y] == pytest.approx([0.51, 0.72, 0.68, 0.49])
    assert ([*trained.error_y.array], [*trained.error_x.array]) == ([0.01, 0.02], [1, 2])
    assert (control.name, control_front.line.dash, front.line.dash) == ("pca", "dot", "solid")
    assert all(trace.showlegend for trace in (control_front, front, control, trained))


def test_a_difference_within_the_noise_takes_nobody_off_the_front():
    l0, quality, seeds = np.array([32.0, 32.0]), np.array([0.70, 0.72]), np.array([3, 3])
    noisy = Estimates(quality, np.array([0.02, 0.02]), seeds)
    exact = Estimates(quality, np.array([0.001, 0.001]), seeds)
    same = Estimates(l0, np.zeros(2), seeds)
    assert [*find_pareto_front(same, noisy)] == [True, True]
    assert [*find_pareto_front(same, exact)] == [False, True]
    # slightly more active features, within their noise, and clearly better
    more = Estimates(l0 + [0, 0.1], np.array([1.0, 1.0]), seeds)
    assert [*find_pareto_front(more, exact)] == [False, True]
