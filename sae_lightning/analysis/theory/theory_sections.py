"""Sections on the claims of the theory: prediction against measurement."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_lightning.analysis.theory.claims import DENSE_TOKENS, TheoryResult
from sae_lightning.analysis.theory.one_concept import make_concept_section
from sae_lightning.report.figures import COLOURS, make_figure, plot_histogram
from sae_lightning.report.section import ResultTable, Section

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COSINE_BINS_PER_POINT = 20  # histogram bins for each point of a curve
MAX_BARS = 80


def make_theory_sections(result: TheoryResult) -> list[Section]:
    """Make one section for each claim that was measured."""
    makers = {
        "agreement": _make_agreement_section,
        "biases": _make_biases_section,
        "overlap": _make_overlap_section,
        "activity": _make_activity_section,
        "detection": lambda result: make_concept_section(
            result.numbers["detection"], result.detectors
        ),
        "dense": _make_dense_section,
    }
    return [make(result) for name, make in makers.items() if name in result.numbers]


def _make_agreement_section(result: TheoryResult) -> Section:
    numbers, cosines = result.numbers, result.numbers["agreement"]
    median, chance = cosines["median"], cosines["chance"]
    if median > 0.9:
        verdict = "a feature is written nearly in the direction in which it is read"
    elif median > 0.5:
        verdict = "directions are alike but not the same"
    elif median > 4 * chance:  # far beyond what random directions reach
        verdict = "directions are related but mostly different"
    else:
        verdict = "directions have nothing to do with one another"
    silent = numbers["features"] - numbers["fired"]
    return Section(
        title="Encoder against decoder directions",
        lead=f"Encoder columns and decoder rows of the {numbers['fired']:,} features that fired "
        f"have a median cosine of {median:.2f}, random directions 0 ± {chance:.2f}: {verdict}.",
        numbers={
            "cosine": f"median {median:.3f}, mean {cosines['mean']:.3f}",
            "central 90 %": f"between {cosines['low']:.3f} and {cosines['high']:.3f}",
            "random directions": f"0 ± {chance:.3f}",
            "never fired": f"{silent:,} features, left out here",
        },
        figures={
            "Cosine of a feature's encoder and decoder": _draw_around_zero(
                result.agreement, "cosine of encoder column and decoder row", "random"
            )
        },
    )


def _draw_around_zero(values: Tensor, axis: str, name: str) -> "Figure":
    """Draw a histogram of the values, with a vertical line at 0 labelled `name`."""
    figure = plot_histogram(values, axis)
    middles = figure.data[0].x
    side = "left" if middles[0] + middles[-1] < 0 else "right"  # where there is more room
    return figure.add_vline(0, annotation_text=name, annotation_position=f"top {side}")


def _make_biases_section(result: TheoryResult) -> Section:
    numbers = result.numbers["biases"]
    negative, median = numbers["negative"], numbers["median"]
    side = "below" if median < 0 else "above"
    if negative > 0.9:
        verdict = "features are silent by default"
    elif negative < 0.5:
        verdict = "many features are on by default"
    else:
        verdict = "most are silent by default"
    limit = "zero" if result.competes else "their threshold"
    condition = " (to fire, they must also be among the k strongest)" if result.competes else ""
    return Section(
        title="Encoder biases",
        lead=f"At the mean activation {negative:.1%} of features are below {limit}{condition}; the "
        f"median feature is {abs(median):.2f} standard deviations {side} it: {verdict}.",
        numbers={
            "central 90 %": f"between {numbers['low']:.2f} and {numbers['high']:.2f} standard "
            "deviations of their pre-activation",
            "b_enc as saved": f"{numbers['raw_negative']:.1%} negative; it also cancels what the "
            "mean activation adds",
            "if pre-activations were normal": f"{numbers['l0_if_normal']:.1f} features would be "
            f"above {limit} on a token; {result.numbers['activity']['mean']:.1f} are active",
        },
        figures={
            "Pre-activation at the mean activation": _draw_around_zero(
                result.margin, "standard deviations above the threshold", "threshold"
            )
        },
    )


def _make_overlap_section(result: TheoryResult) -> Section:
    numbers = result.numbers["overlap"]
    decoder, random = numbers["decoder"], numbers["random"]
    ratio = decoder["99%"] / random["99%"]
    if ratio < 1.1:
        verdict = "they are as nearly orthogonal as random directions"
    elif decoder["above_0.3"] < 0.01:
        verdict = f"nearly orthogonal, though {ratio:.2f} times as alike as random ones"
    else:
        verdict = f"they are {ratio:.1f} times as alike as random ones"
    names = {"decoder": "decoder rows", "random": "random", "like_data": "random, like the data"}
    header = ["directions", "median |cosine|", "99 % below", "above 0.3", "nearest neighbour"]
    formats = {"median": ".3f", "99%": ".3f", "above_0.3": ".3%", "nearest": ".3f"}
    table = [
        [name, *(format(numbers[key][column], spec) for column, spec in formats.items())]
        for key, name in names.items()
    ]
    densities = make_figure("cosine", "share of pairs per 0.02").update_yaxes(
        type="log", exponentformat="power"
    )
    for key, name in names.items():
        counts = result.overlap[key].counts.view(-1, COSINE_BINS_PER_POINT).sum(dim=1)
        middles = (torch.arange(len(counts)) + 0.5) * 2 / len(counts) - 1
        # a log axis has no 0: NaN leaves a gap
        shares = torch.where(counts > 0, counts / counts.sum(), math.nan)
        densities.add_scatter(x=middles.numpy(), y=shares.numpy(), name=name, mode="lines")
    return Section(
        title="Nearly orthogonal directions",
        lead=f"{decoder['above_0.3']:.2%} of the pairs of decoder rows have a |cosine| above 0.3 "
        f"(random directions: {random['above_0.3']:.2%}), and 99 % are below {decoder['99%']:.2f} "
        f"(random directions: {random['99%']:.2f}): {verdict}.",
        numbers={
            "compared": f"{numbers['rows']:,} of {result.numbers['fired']:,} rows with all others"
        },
        table=ResultTable(header, table),
        figures={"Cosines between directions": densities},
    )


def _make_activity_section(result: TheoryResult) -> Section:
    numbers, features = result.numbers["activity"], result.numbers["features"]
    deviation, independent = numbers["deviation"], numbers["deviation_if_independent"]
    # 0 / 0 if every feature fires always or never: nothing deviates
    ratio = deviation / independent if independent else 1.0
    if ratio > 1.1:
        compared = f"{ratio:.1f} times what"
    else:
        compared = "about what" if ratio > 0.9 else "less than"
    return Section(
        title="Features per token",
        lead=f"{numbers['mean']:.1f} of {features:,} features are active on a token, between "
        f"{numbers['5%']} and {numbers['95%']} on 90 % of tokens; the standard deviation of "
        f"{deviation:.1f} is {compared} features that fire independently would give.",
        numbers={
            "median": f"{numbers['50%']}",
            "central 50 %": f"between {numbers['25%']} and {numbers['75%']}",
            "all": f"between {numbers['0%']} and {numbers['100%']}",
            "tokens": f"{result.numbers['tokens']:,}",
        },
        figures={"Active features of a token": _draw_active(result.l0_counts)},
    )


def _draw_active(l0_counts: Tensor) -> "Figure":
    """Draw a histogram of active features per token, with at most MAX_BARS bars. l0_counts:
    [features + 1] number of tokens with 0, 1, 2, ... active features."""
    greatest = int(l0_counts.nonzero().max())
    width = -(-(greatest + 1) // MAX_BARS)  # L0s in a bar, rounded up
    heights = torch.stack([part.sum() for part in l0_counts[: greatest + 1].split(width)])
    middles = torch.arange(len(heights)) * width + (width - 1) / 2
    figure = make_figure("active features", "tokens", bargap=0)
    return figure.add_bar(x=middles.numpy(), y=heights.numpy(), width=width)


def _make_dense_section(result: TheoryResult) -> Section:
    numbers, sample = result.numbers["dense"], min(DENSE_TOKENS, result.numbers["tokens"])
    worth, d = numbers["worth"], len(numbers["curve"]) - 1
    checks = ", ".join(
        f"{check['measured']:.6f} with {check['features']:,} (bound {check['expected']:.6f})"
        for check in numbers["checks"]
    )
    if worth < d:
        # 1e-9: a rounding error must not cost a whole feature
        compared = f"{math.ceil(worth - 1e-9)} dense features"
    else:
        compared = f"no fewer dense features than the site has dimensions, {d:,}"
    return Section(
        title="Dense autoencoders",
        lead=f"Without sparsity {d // 2:,} features explain at most {numbers['curve'][d // 2]:.2%} "
        f"of the variance and {d:,}, one for each dimension, all of it. To explain as much as the "
        f"SAE does with {numbers['l0']:.1f} active features a token ({numbers['explained']:.1%}) "
        f"it takes {compared}.",
        numbers={
            "networks that were run": f"explained variance {checks}, on {sample:,} of the tokens",
            "as many dense as active": f"{numbers['l0']:.1f} dense features explain "
            f"{numbers['at_l0']:.1%}",
        },
        figures={"Explained variance by number of features": _draw_curve(result)},
    )


def _draw_curve(result: TheoryResult) -> "Figure":
    numbers = result.numbers["dense"]
    figure = make_figure("features", "explained variance")
    figure.add_scatter(y=numbers["curve"], name="dense, at best", mode="lines")
    figure.add_scatter(
        name=f"dense, run on {min(DENSE_TOKENS, result.numbers['tokens']):,} of the tokens",
        x=[check["features"] for check in numbers["checks"]],
        y=[check["measured"] for check in numbers["checks"]],
        mode="markers",
        marker={"size": 9, "symbol": "x", "color": COLOURS[0]},
    )
    return figure.add_scatter(
        name="SAE, at its L0",
        x=[numbers["l0"], numbers["worth"]],  # a line to the curve, at the same explained variance
        y=[numbers["explained"]] * 2,
        mode="lines+markers",
        line={"color": COLOURS[1], "dash": "dot"},
        marker={"size": [11, 0], "symbol": "diamond"},
    )
