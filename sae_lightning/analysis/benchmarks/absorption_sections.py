"""Sections on absorption: the SAE beside its controls, and each concept."""

import math
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from sae_lightning.analysis.benchmarks.absorption import (
    ConceptResult,
    ConceptSamples,
    list_values,
)
from sae_lightning.report.figures import make_figure
from sae_lightning.report.section import ResultTable, Section

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SCORE_FIELDS = {
    "probe F1": "probe_f1",
    "F1": "f1",
    "silent": "silent",
    "absorbed": "absorbed",
    "fraction": "fraction",
    "closest silent with a child": "silent_with_child",
    "closest silent without": "silent_without",
}
"""Heading of a column -> field of `ConceptResult`."""
SHOWN_EXAMPLES = 3  # absorbed samples to list for each concept


def make_absorption_sections(
    samples: ConceptSamples,
    results: dict[str, list[ConceptResult]],
    means: dict[str, dict[str, float]],
) -> list[Section]:
    """Make sections on an SAE beside its controls, and on each concept. Keys of `results` and
    `means`: first the SAE's name, then those of its controls."""
    sae_name, *controls = results
    columns = {
        name: field
        for name, field in SCORE_FIELDS.items()
        if not all(math.isnan(mean[field]) for mean in means.values())
    }
    without_own = sum(not result.features for result in results[sae_name])
    without_own_note = (
        f"{without_own} of the {samples.noun}s, which silent, absorbed and fraction leave out"
    )
    control_note = (
        "No controls of this SAE are known: train it in a sweep with sweep.controls=true."
    )
    tested = int(samples.parts.test.sum())
    rows = []
    for name, concepts in results.items():
        scores = [_format_mean(concepts, field) for field in columns.values()]
        rows.append([name, f"{means[name]['features']:.1f}", *scores])
    return [
        Section(
            title="Absorption and splitting",
            lead=_write_lead(samples.noun, means, controls),
            numbers={
                f"{samples.noun}s": f"{len(samples.concepts)} ({' '.join(samples.concepts)})",
                "samples": f"{len(samples.names):,}, of which {tested:,} are the test part; "
                "the others fit probes and choose features",
                "fraction": "share of the concept that other features write, in full or in part",
                "after ±": f"standard error over {samples.noun}s",
                "without own features": without_own_note if without_own else "",
                "note": "" if controls else control_note,
            },
            table=ResultTable(["", "own features", *columns], rows),
        ),
        _make_concepts_section(samples.noun, results[sae_name], columns),
    ]


def _write_lead(noun: str, means: dict[str, dict[str, float]], controls: list[str]) -> str:
    sae_name, mean = next(iter(means.items()))
    if math.isnan(mean["silent"]):
        lead = f"No {noun} has a feature of its own that could be absorbed."
    else:
        lead = (
            f"A {noun} has {mean['features']:.1f} features of its own (1 = not split), which "
            f"detect it with an F1 of {mean['f1']:.2f}. On {mean['silent']:.0%} of the samples "
            f"that have the {noun} none of them fires; on {mean['absorbed']:.1%} one other feature "
            f"writes it instead (absorption; {mean['fraction']:.1%} with partial absorption)."
        )
    if not math.isnan(mean["silent_with_child"]):
        without = f", and on {mean['silent_without']:.0%} of those without"
        if math.isnan(mean["silent_without"]):
            without = "; there are none without"
        lead += (
            f" The feature closest to the {noun}'s direction is silent on "
            f"{mean['silent_with_child']:.0%} of the samples with a child{without}."
        )
    if not controls:
        return lead
    best = max(controls, key=lambda name: means[name]["f1"])
    absorbed = [means[name]["absorbed"] for name in controls]
    absorbed = [share for share in absorbed if not math.isnan(share)]  # NaN: no own features
    if not absorbed:
        return f"{lead} In controls no {noun} has a feature of its own."
    lead += (
        f" In controls {min(absorbed):.1%} to {max(absorbed):.1%} are absorbed, with an F1 of at "
        f"most {means[best]['f1']:.2f} ({best.replace('_', ' ')})."
    )
    if means[best]["f1"] >= mean["f1"]:
        lead += f" As that is no less than the F1 of {sae_name}, the rates say little."
    return lead


def _make_concepts_section(
    noun: str, results: list[ConceptResult], columns: dict[str, str]
) -> Section:
    absorbed = [result for result in results if result.absorbed > 0]
    worst = max(absorbed, key=lambda result: result.absorbed, default=None)
    return Section(
        title=f"Each {noun}",
        lead=(
            f"Most is absorbed of {worst.concept}: {worst.absorbed:.1%} of {worst.samples} samples."
            if worst
            else f"No {noun} is absorbed."
        ),
        table=ResultTable(
            [noun, "samples", "own features", *columns, "absorbed by"],
            [
                [
                    result.concept,
                    str(result.samples),
                    " ".join(map(str, result.features)) or "none",
                    *(_format_mean([result], field) for field in columns.values()),
                    ", ".join(f"{name}: {i}" for name, i in result.examples[:SHOWN_EXAMPLES]),
                ]
                for result in results
            ],
        ),
        figures={f"Samples of each {noun} on which its features are silent": _draw_shares(results)},
    )


def _draw_shares(results: list[ConceptResult]) -> "Figure":
    figure = make_figure("", "share of samples").update_xaxes(type="category")
    concepts = [result.concept for result in results]
    for name in ("silent", "absorbed"):
        figure.add_bar(name=name, x=concepts, y=[getattr(result, name) for result in results])
    return figure


def _format_mean(results: list[ConceptResult], field: str) -> str:
    values = list_values(results, field)
    if not values:
        return "–"
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{error}"
