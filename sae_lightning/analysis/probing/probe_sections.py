"""Sections on probes: how well features and neurons predict one label."""

import html
from statistics import mean, stdev
from typing import TYPE_CHECKING

from sae_lightning.analysis.probing.probes import (
    FEATURES,
    NEURONS,
    RANDOM,
    BestUnit,
    Probes,
    ProbeScore,
)
from sae_lightning.report.figures import GREY, make_figure
from sae_lightning.report.section import ResultTable, Section

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UNIT_KINDS = (FEATURES, NEURONS, RANDOM)
MEASURES = {"AUROC": "auroc", "accuracy": "accuracy"}  # shown name -> field of `FoldScore`


def make_probe_sections(probes: Probes) -> list[Section]:
    """Make sections on how well k units tell classes apart, and on the best unit for each class."""
    return [_make_comparison_section(probes), _make_units_section(probes)]


def _make_comparison_section(probes: Probes) -> Section:
    sizes = list(dict.fromkeys(score.k for score in probes.scores))
    smallest, all_neurons = sizes[0], probes.find_score(NEURONS, None)
    features, neurons = (probes.find_score(kind, smallest) for kind in (FEATURES, NEURONS))
    return Section(
        title=f"Probes for {probes.label}",
        lead=(
            f"Probes of {probes.label} on {_name_units(smallest)} for each class have a held-out "
            f"AUROC of {features.auroc:.2f} with features and {neurons.auroc:.2f} with neurons: "
            f"{describe_winner(features, neurons)}. (As many random directions as features: "
            f"{probes.find_score(RANDOM, smallest).auroc:.2f}; chance: 0.50.) All features "
            f"together reach {probes.find_score(FEATURES, None).auroc:.2f}, the dense activation "
            f"(all neurons) {all_neurons.auroc:.2f}."
        ),
        numbers={
            "pieces of text": f"{sum(probes.pieces):,} of up to {probes.context} tokens",
            "classes": f"{len(probes.classes)}",
            "most frequent class": f"accuracy {probes.majority:.3f}",
            "folds": f"{len(all_neurons.fold_scores)}",
            "note": " ".join(probes.notes),
        },
        table=ResultTable(
            ["", *(f"k = {k}" if k else "all" for k in sizes)],
            [
                [
                    f"{kind}: {name}",
                    *(_format_cell(probes.find_score(kind, k), measure) for k in sizes),
                ]
                for name, measure in MEASURES.items()
                for kind in UNIT_KINDS
            ],
        ),
        figures={
            f"Held-out {name} of probes for {html.escape(probes.label)}": _draw_scores(
                probes, sizes, name, measure
            )
            for name, measure in MEASURES.items()
        },
    )


def describe_winner(features: ProbeScore, neurons: ProbeScore) -> str:
    """Say whether features or neurons have the higher AUROC, by how much, and in how many folds."""
    pairs = zip(features.fold_scores, neurons.fold_scores, strict=True)
    gaps = [feature.auroc - neuron.auroc for feature, neuron in pairs]
    mean_gap = mean(gaps)
    if abs(mean_gap) < 0.005:  # would be printed as 0.00
        return "neither is ahead"
    ahead = FEATURES if mean_gap > 0 else NEURONS
    folds = sum(gap * mean_gap > 0 for gap in gaps)  # folds with the sign of the mean
    return f"{ahead} are ahead by {abs(mean_gap):.2f}, in {folds} of {len(gaps)} folds"


def _name_units(k: int | None) -> str:
    if k is None:
        return "all units"
    return "the single best unit" if k == 1 else f"the {k} best units"


def _standard_error(values: list[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _format_cell(score: ProbeScore | None, measure: str) -> str:
    if score is None:
        return ""
    values = [getattr(fold_score, measure) for fold_score in score.fold_scores]
    return f"{mean(values):.3f} ± {_standard_error(values):.3f}"


def _draw_scores(probes: Probes, sizes: list[int | None], name: str, measure: str) -> "Figure":
    figure = make_figure("units for each class", f"held-out {name}").update_xaxes(type="category")
    for kind in UNIT_KINDS:
        scores = [score for k in sizes if (score := probes.find_score(kind, k))]
        values = [[getattr(fold, measure) for fold in score.fold_scores] for score in scores]
        figure.add_scatter(
            name=kind,
            x=[str(score.k or "all") for score in scores],
            y=[*map(mean, values)],
            error_y={"array": [*map(_standard_error, values)]},
            mode="lines+markers",
        )
    chance = 0.5 if measure == "auroc" else probes.majority
    return figure.add_scatter(
        name="chance" if measure == "auroc" else "most frequent class",
        x=[str(sizes[0] or "all"), str(sizes[-1] or "all")],
        y=[chance, chance],
        mode="lines",
        line={"color": GREY, "width": 1.5, "dash": "dot"},
    )


def _make_units_section(probes: Probes) -> Section:
    best_units = (probes.best_units[kind] for kind in (FEATURES, NEURONS))
    rows = list(zip(probes.classes, probes.pieces, *best_units, strict=True))
    rows.sort(key=lambda row: -row[2].auroc)  # by the AUROC of the best feature
    best_class, _, best, _ = rows[0]
    better = sum(feature.auroc > neuron.auroc for _, _, feature, neuron in rows)
    header = ["feature", "folds", "AUROC", "neuron", "neuron's folds", "neuron's AUROC"]
    return Section(
        title=f"The best unit for each {probes.label}",
        lead=(
            f"The best of all is feature {best.unit} for {best_class}, with a held-out AUROC of "
            f"{best.auroc:.2f}. For {better} of {len(rows)} classes the best feature does better "
            "than the best neuron. (Units are chosen anew for each tested fold: shown is "
            "the one chosen most often, for how many folds, and the mean AUROC over all folds.)"
        ),
        table=ResultTable(
            [probes.label, "pieces", *header],
            [
                [class_name, str(pieces), *_format_unit(feature), *_format_unit(neuron)]
                for class_name, pieces, feature, neuron in rows
            ],
        ),
    )


def _format_unit(best: BestUnit) -> list[str]:
    return [str(best.unit), str(best.folds), f"{best.auroc:.3f}"]
