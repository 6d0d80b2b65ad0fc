"""The Pareto front on points worked out by hand, and the plot that draws it."""

import math
import random

import pytest

from sae_lightning.report.pareto import LABELLED, Point, pareto, tradeoff

NAN = math.nan


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(10, 0.5)], [0]),
        # (15, 0.4) loses to (10, 0.5) in both; (30, 0.7) to (20, 0.7) in L0
        ([(10, 0.5), (20, 0.7), (15, 0.4), (30, 0.7), (40, 0.9)], [0, 1, 4]),
        # in order of L0, whatever the order of the runs
        ([(40, 0.9), (10, 0.5), (20, 0.7)], [1, 2, 0]),
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
    assert pareto(points) == front


def test_every_point_off_the_front_is_beaten_by_one_on_it():
    rng = random.Random(0)
    points = [(l0, rng.randrange(l0 + 1)) for l0 in rng.choices(range(20), k=60)]
    front = pareto(points)
    assert 1 < len(front) < len(points)
    l0, quality = zip(*(points[i] for i in front), strict=True)
    assert list(l0) == sorted(l0)
    assert list(quality) == sorted(quality), "more active features have to pay off"
    for i in set(range(len(points))) - set(front):
        assert any(
            points[j] != points[i] and points[j][0] <= points[i][0] and points[j][1] >= points[i][1]
            for j in front
        )


def point(l0: float, quality: float, label: str = "", group: str = "") -> Point:
    return Point(l0, quality, label, group, details=f"{label}\nL0: {l0}")


def test_the_line_joins_the_front_and_the_rest_is_pale():
    line, *traces = tradeoff([point(30, 0.7), point(10, 0.5), point(12, 0.4)], "EV")["data"]
    assert (line["x"], line["y"]) == ([10, 30], [0.5, 0.7])
    (trace,) = traces
    opacity = dict(zip(trace["x"], trace["marker"]["opacity"], strict=True))
    assert opacity[10] == opacity[30] == 1 > opacity[12]


def test_points_without_a_number_are_not_drawn():
    assert tradeoff([], "EV") is None
    assert tradeoff([point(NAN, 0.5), point(3, NAN)], "EV") is None
    _, trace = tradeoff([point(NAN, 0.5), point(3, 0.5)], "EV")["data"]
    assert trace["x"] == [3]


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([10, 100], True), ([10, 30], False), ([0, 100], False), ([50], False)],
)
def test_the_axis_is_logarithmic_where_l0_spans_much(values, logarithmic):
    axis = tradeoff([point(l0, 0.5) for l0 in values], "EV")["layout"]["xaxis"]
    assert (axis.get("type") == "log") == logarithmic
    low, high = axis["range"]
    ends = [math.log10(v) for v in values] if logarithmic else values
    assert low < min(ends) <= max(ends) < high


def test_few_points_are_labelled_and_many_are_not():
    for count, mode in ((LABELLED, "markers+text"), (LABELLED + 1, "markers")):
        _, trace = tradeoff([point(l0 + 1, 0.5, "x") for l0 in range(count)], "EV")["data"]
        assert trace["mode"] == mode


def test_groups_have_their_own_colour_and_shape():
    points = [
        point(1, 0.1, group="relu"),
        point(2, 0.2, group="dense"),
        point(3, 0.3, group="relu"),
    ]
    figure = tradeoff(points, "EV", grouping="model")
    _, relu, dense = figure["data"]
    assert (relu["name"], relu["x"], dense["name"], dense["x"]) == ("relu", [1, 3], "dense", [2])
    assert relu["marker"]["color"] != dense["marker"]["color"]
    assert relu["marker"]["symbol"] != dense["marker"]["symbol"]
    assert figure["layout"]["legend"]["title"]["text"] == "model"


def test_names_are_text_and_not_markup():
    figure = tradeoff([point(1, 0.1, "<b>a&b</b>", group="<i>")], "EV", grouping="<u>")
    trace = figure["data"][1]
    assert trace["text"] == ["&lt;b&gt;a&amp;b&lt;/b&gt;"]
    assert trace["hovertext"] == ["&lt;b&gt;a&amp;b&lt;/b&gt;<br>L0: 1"]
    assert trace["name"] == "&lt;i&gt;"
    assert figure["layout"]["legend"]["title"]["text"] == "&lt;u&gt;"
