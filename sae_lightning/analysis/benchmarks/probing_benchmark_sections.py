"""Sections on k-sparse probing: features beside neurons, random directions and controls."""

import math
from typing import TYPE_CHECKING

from sae_lightning.analysis.benchmarks.probing_scores import SCORED_SIZE, SIZES, ProbingScores
from sae_lightning.analysis.probing.probes import FEATURES, NEURONS, RANDOM
from sae_lightning.report.figures import make_figure
from sae_lightning.report.noise import find_critical_t
from sae_lightning.report.section import ResultTable, Section

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def make_probing_sections(scores: ProbingScores) -> list[Section]:
    """Make sections on the mean AUROC over sets for each k, and on the AUROC on each set."""
    return [_make_mean_section(scores), _make_sets_section(scores)]


def _make_mean_section(scores: ProbingScores) -> Section:
    kinds = [*scores.aurocs]
    _, splits = scores.aurocs[FEATURES][SCORED_SIZE].shape
    texts = sum(len(s.texts) for s in scores.sets)
    rivals = [compare_with_features(scores, kind) for kind in (NEURONS, RANDOM)]
    controls = [compare_with_features(scores, kind) for kind in _list_controls(scores)]
    spread_note = ""
    if splits > 1:
        spread = max(scores.measure_spread(kind, SCORED_SIZE) for kind in kinds)
        spread_note = f"; between them the mean over sets has a spread of at most {spread:.3f}"
    return Section(
        title="k-sparse probing",
        lead=(
            f"{SCORED_SIZE} features tell two classes of texts apart with a mean AUROC of "
            f"{_format_mean(*scores.average_sets(FEATURES, SCORED_SIZE))} "
            f"on {len(scores.sets)} sets; {'; '.join(rivals)}. The dense probe (all neurons) has "
            f"{_format_mean(*scores.average_sets(NEURONS, None))}."
        ),
        numbers={
            "texts": f"{texts:,} in {len(scores.sets)} sets, no text twice; the last token of each "
            "is read",
            "after ±": "standard error over sets; that of a difference is over differences on the "
            "same set",
            "splits": f"{splits} of each set{spread_note}",
            "controls": "; ".join(controls)
            or "none known; train the SAE in a sweep with sweep.controls=true",
            "note": "Units and regularisation are chosen on the training part of a set.",
        },
        table=ResultTable(
            ["", *(f"k = {k}" for k in SIZES), "all"],
            [[kind, *(_format_cell(scores, kind, k) for k in (*SIZES, None))] for kind in kinds],
        ),
        figures={"Mean held-out AUROC over sets": _draw_means(scores)},
    )


def compare_with_features(scores: ProbingScores, rival: str) -> str:
    """Describe the score of units of the kind `rival`, and whether features are ahead or behind.
    Only a difference that a t-test over sets finds at the 5 % level counts."""
    mean, error = scores.compare(FEATURES, rival, SCORED_SIZE)
    score, sets = f"{rival} {scores.average_sets(rival, SCORED_SIZE)[0]:.3f}", len(scores.sets)
    if sets == 1:
        return f"{score} ({mean:+.3f}; on one set the noise is unknown)"
    if abs(mean) <= find_critical_t(sets - 1) * error:
        return f"{score} (no clear difference: {mean:+.3f} ± {error:.3f})"
    ahead = "features are ahead" if mean > 0 else "features are behind"
    return f"{score} ({ahead} by {abs(mean):.3f} ± {error:.3f})"


def _make_sets_section(scores: ProbingScores) -> Section:
    means = {kind: by_k[SCORED_SIZE].mean(1) for kind, by_k in scores.aurocs.items()}  # [sets]
    columns = {kind: means[kind] for kind in (FEATURES, NEURONS, RANDOM)}
    if controls := _list_controls(scores):
        columns["controls (mean)"] = sum(means[kind] for kind in controls) / len(controls)
    columns["dense probe"] = scores.aurocs[NEURONS][None].mean(1)
    ahead = int((columns[FEATURES] > columns[NEURONS]).sum())
    return Section(
        title="Each set of texts",
        lead=(
            f"On {ahead} of {len(scores.sets)} sets {SCORED_SIZE} features do better than "
            f"{SCORED_SIZE} neurons. (AUROC of probes on {SCORED_SIZE} units, mean over splits.)"
        ),
        table=ResultTable(
            ["set", *columns],
            [
                [labelled_set.name, *(f"{values[i]:.3f}" for values in columns.values())]
                for i, labelled_set in enumerate(scores.sets)
            ],
        ),
    )


def _list_controls(scores: ProbingScores) -> list[str]:
    """The kinds of units that are features of controls."""
    return [kind for kind in scores.aurocs if kind not in (FEATURES, NEURONS, RANDOM)]


def _draw_means(scores: ProbingScores) -> "Figure":
    figure = make_figure("units of a probe", "held-out AUROC").update_xaxes(type="category")
    for kind, by_k in scores.aurocs.items():
        averages = [scores.average_sets(kind, k) for k in by_k]
        figure.add_scatter(
            name=kind,
            x=[str(k or "all") for k in by_k],
            y=[mean for mean, _ in averages],
            error_y={"array": [error for _, error in averages]},
            mode="lines+markers",
        )
    return figure


def _format_cell(scores: ProbingScores, kind: str, k: int | None) -> str:
    return _format_mean(*scores.average_sets(kind, k)) if k in scores.aurocs[kind] else ""


def _format_mean(mean: float, error: float) -> str:
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
