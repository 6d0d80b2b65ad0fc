"""Compares each trained SAE with the best of its controls, in a table and in sentences."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from sae_lightning.report.means import TRAINED, MeansTable
from sae_lightning.report.noise import differ_significantly

SAME_L0 = 0.1  # largest difference from the trained SAE's L0, as a share of it
MAX_SENTENCES = 4  # sentences on one metric
BETTER, WORSE, TIED, UNKNOWN = "better", "worse", "not significant", "too few seeds: noise unknown"
OTHER_L0 = "L0 differs"
# Metric -> what an SAE with the value {} does.
CLAIMS = {
    "explained_variance": "explains {} of the variance",
    "recovered": "recovers {} of the concepts",
    "stable": "repeats {} of its features under another seed",
}
# Control -> what the SAE's training has and the control's lacks.
ADDED_BY_TRAINING = {
    "frozen_decoder": "training the decoder",
    "soft_frozen_decoder": "letting decoder directions leave their random start",
    "frozen_encoder": "training the encoder",
    "shuffled_activations": "training on how dimensions depend on one another",
    "pca": "learning features instead of taking principal components",
}


class Comparison(NamedTuple):
    """A metric of a trained SAE and of the control that `compare_with_controls` chooses."""

    trained: int
    """Row of the trained SAE in the `MeansTable`."""
    control: int
    """Row of the control."""
    metric: str
    difference: float
    """Trained minus control."""
    verdict: str
    """BETTER, WORSE, TIED, UNKNOWN or OTHER_L0."""


def compare_with_controls(means: MeansTable) -> list[Comparison]:
    """Compare each trained SAE with its best control in every metric where higher values are better
    (`column.better` is 1) or lower ones (-1). A control whose L0 is within 10 % of the trained
    SAE's is preferred to all others. Metrics that are NaN are left out."""
    comparisons = []
    for row, kind in enumerate(means.kinds):
        if kind != TRAINED:
            continue
        controls = [
            i
            for i, experiment in enumerate(means.experiments)
            if experiment == means.experiments[row] and means.kinds[i] != TRAINED
        ]
        for name, column in means.columns.items():
            values = means.mean[name]
            candidates = values[controls].dropna().index if column.better else []
            if values.isna()[row] or not len(candidates):
                continue
            l0 = means.mean["l0"]
            best = max(
                candidates, key=lambda i: (has_same_l0(l0[i], l0[row]), values[i] * column.better)
            )
            difference = values[row] - values[best]
            verdict = _judge(means, row, best, name)
            comparisons.append(Comparison(row, best, name, difference, verdict))
    return comparisons


def has_same_l0(control: float, trained: float) -> bool:
    """Whether the L0 of a control is within 10 % of its trained SAE's; only then can other metrics
    of the two be compared."""
    return abs(control - trained) <= SAME_L0 * trained


def _judge(means: MeansTable, row: int, control: int, name: str) -> str:
    """Return the verdict on metric `name` of the trained SAE in `row` against the `control`."""
    l0 = means.mean["l0"]
    if not has_same_l0(l0[control], l0[row]):
        return OTHER_L0
    estimates = means.estimate(name)
    if np.isnan(estimates.spread[[row, control]]).all():
        return UNKNOWN
    if not differ_significantly(estimates.pick([row]), estimates.pick([control])).item():
        return TIED
    is_higher = estimates.mean[row] > estimates.mean[control]
    return BETTER if is_higher == (means.columns[name].better > 0) else WORSE


def write_claims(means: MeansTable, comparisons: list[Comparison]) -> list[str]:
    """For each metric of CLAIMS, write a sentence for each trained SAE with controls, or one that
    counts verdicts if there are more than MAX_SENTENCES. Without controls, write a sentence on the
    stable features of the first MAX_SENTENCES trained SAEs."""
    sentences = []
    for name in CLAIMS:
        chosen = [c for c in comparisons if c.metric == name]
        if len(chosen) > MAX_SENTENCES:
            sentences.append(_count_verdicts(means, chosen))
        else:
            sentences += [_write_sentence(means, c) for c in chosen]
    if "stable" in means.columns and not means.has_controls:
        rows = [*means.mean["stable"].dropna().index[:MAX_SENTENCES]]
        sentences += [f"{means.name_row(i)} {_write_claim(means, 'stable', i)}." for i in rows]
    return sentences


def _write_claim(means: MeansTable, name: str, row: int) -> str:
    """What the SAE in `row` does by metric `name`, such as `explains 0.8123 of the variance`."""
    return CLAIMS[name].format(means.format_cell(row, name))


def _write_sentence(means: MeansTable, c: Comparison) -> str:
    """The sentence on one comparison: the trained SAE, its best control and the verdict."""
    control, l0 = means.kinds[c.control], means.mean["l0"]
    amount = means.columns[c.metric].format_value(abs(c.difference)).replace("%", " points")
    added = ADDED_BY_TRAINING.get(control, "what the control does not learn")
    end = {
        BETTER: f"{added} is worth {amount}",
        WORSE: f"the control is better by {amount}",
        TIED: f"they differ by {amount}, which is not significant",
        UNKNOWN: f"they differ by {amount}; with so few seeds, the noise is unknown",
        OTHER_L0: f"they differ by {amount}, but only SAEs of the same L0 can be compared",
    }[c.verdict]
    return (
        f"{means.name_row(c.trained)} {_write_claim(means, c.metric, c.trained)} at L0 "
        f"{l0[c.trained]:,.1f}; its best control, {control}, "
        f"{means.format_cell(c.control, c.metric)} at L0 {l0[c.control]:,.1f}: {end}."
    )


def _count_verdicts(means: MeansTable, comparisons: list[Comparison]) -> str:
    """The sentence that counts the verdicts of `comparisons` in one metric."""
    counts = Counter(c.verdict for c in comparisons).most_common()
    return (
        f"{means.columns[comparisons[0].metric].label} of {len(comparisons)} trained SAEs, each "
        f"beside its best control: {', '.join(f'{n} {verdict}' for verdict, n in counts)}."
    )
