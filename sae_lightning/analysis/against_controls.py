"""Compares the scores of an SAE with those of its controls.

    text          -> SAE     -> token sets, detected concepts, probes -> Scores |
                  -> control -> token sets, detected concepts, probes -> Scores | -> Section
    held-out text -> both    -> scorecards                            -> Scores |

A random dictionary of the same size does surprisingly well on the usual scores (Korznikov et al.
2026, 2602.14111), so an SAE's score means little without the score of a control.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from torch import Tensor

from sae_lightning.analysis.collect import Reducer
from sae_lightning.analysis.probing.probes import CONTROL_K, FEATURES, RANDOM, Probes
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.sample import SequenceSampler
from sae_lightning.analysis.survey.token_sets import score_token_sets
from sae_lightning.analysis.theory.detection import find_detector
from sae_lightning.analysis.theory.one_concept import ConceptCounts, find_frequent_concepts
from sae_lightning.report.comparison import has_same_l0
from sae_lightning.report.noise import find_critical_t
from sae_lightning.report.section import ResultTable, Section
from sae_lightning.sae import SAE
from sae_lightning.sae.controls import Control


class Score(NamedTuple):
    """One score of one SAE."""

    value: float
    samples: Sequence[float] = ()
    """Numbers with the mean `value`, for a t-test; empty for scores that are not tested."""


class ScoreKind(NamedTuple):
    """How a score is shown, and which claim about features it supports."""

    label: str
    template: str
    """A format string."""
    claim: str = ""
    """What features with a higher score do better, such as "detect concepts"; may be empty."""
    paired: bool = False
    """Whether sample i of two SAEs is measured on the same concept or fold."""


SCORE_KINDS = {
    "l0": ScoreKind("L0", "{:.1f}"),
    "explained_variance": ScoreKind("EV", "{:.3f}"),
    "ce_recovered": ScoreKind("CE recovered", "{:.3f}"),
    "kl": ScoreKind("KL (nats)", "{:.4f}"),
    "features_share": ScoreKind("CE: features", "{:.1%}"),
    "error_share": ScoreKind("CE: error", "{:.1%}"),
    "recovered": ScoreKind("concepts recovered", "{:.1%}"),  # of data=synthetic
    "token_score": ScoreKind("token score", "{:.2f}", "match token sets"),
    "token_like": ScoreKind("  above 0.5", "{:.0%}"),
    # properties of tokens in a text, such as digits or capitals
    "concepts": ScoreKind("concepts, F1", "{:.2f}", "detect concepts", paired=True),
}
for k in CONTROL_K:  # the probes of task=overview predict who speaks in the plays
    manner = "one by one" if k == 1 else f"in groups of {k}"
    SCORE_KINDS[f"probe_{k}"] = ScoreKind(
        f"speakers, k = {k}", "{:.3f}", f"tell speakers apart {manner}", paired=True
    )
Scores = dict[str, Score]
"""Name in SCORE_KINDS -> score, of one SAE; NaNs are left out."""


class ControlReducers:
    """Reducers for the scores of a control's features."""

    def __init__(self, subject: Subject, sae: SAE):
        self.concepts = ConceptCounts(subject, sae.config.features)
        self.sampler = SequenceSampler(sae.config.features, subject.config.seed)

    @property
    def reducers(self) -> list[Reducer]:
        return [self.concepts, self.sampler]

    def result(self) -> Scores:
        """Scores over all text that was read."""
        counts, vocabulary = self.concepts.counts.result(), self.concepts.vocabulary
        f1 = [find_detector(counts, c).f1 for c in find_frequent_concepts(counts).values()]
        token_scores = score_token_sets(self.sampler.result(), len(vocabulary)).score
        return score_features(token_scores, f1)


def score_features(token_scores: Tensor, f1: Sequence[float]) -> Scores:
    """Compute scores from the token score of each feature [features], NaN where it has none, and
    from the F1 of the best feature for each frequent concept, in the same order for all SAEs."""
    values = token_scores[~token_scores.isnan()].tolist()
    scores = {}
    if values:
        scores["token_score"] = Score(fmean(values), values)
        scores["token_like"] = Score(fmean(value > 0.5 for value in values))
    if f1:
        scores["concepts"] = Score(fmean(f1), f1)
    return scores


def score_probes(probes: Probes, kind: str = FEATURES) -> Scores:
    """Scores of probes on units of a `kind`: FEATURES, RANDOM, or the name of a control."""
    scores = {}
    for k in CONTROL_K:
        score = probes.find_score(kind, k)
        if score and not math.isnan(score.auroc):
            scores[f"probe_{k}"] = Score(score.auroc, [fold.auroc for fold in score.fold_scores])
    return scores


def pick_scores(numbers: Mapping[str, Any]) -> Scores:
    """Pick the numbers of a scorecard that are in SCORE_KINDS and not NaN."""
    names = [name for name in SCORE_KINDS if name in numbers]
    return {name: Score(numbers[name]) for name in names if not math.isnan(numbers[name])}


def make_control_section(
    scores: Scores, controls: Mapping[str, Scores], random: Scores | None = None
) -> Section:
    """Make a table of all scores, with sentences that say what the SAE does better than its
    controls. random: scores of random directions, if measured."""
    columns = {"this SAE": scores, **controls}
    if random:
        columns[RANDOM] = random
    rows = [
        [kind.label, *(_format_score(column.get(name), kind) for column in columns.values())]
        for name, kind in SCORE_KINDS.items()
        if any(name in column for column in (scores, *controls.values()))
    ]
    notes = {name: Control[name].value for name in controls if name in Control.__members__}
    claims = _compare_features(scores, controls)
    if "features_share" in scores:
        notes["CE: features, error"] = "how much of the cost of mean ablation each alone recovers"
    if "concepts" in scores:
        notes["concepts, F1"] = "of the best single feature for each"
    if "probe_1" in scores:
        notes["speakers"] = "AUROC of probes on k features for each"
    if claims:
        notes["called better"] = (
            "the mean over features, concepts or folds is higher by more than their spread "
            "explains (t-test, 5 % level); the spread between seeds is not included"
        )
    return Section(
        title="Comparison with controls",
        lead=claims + _compare_reconstructions(scores, controls),
        numbers=notes,
        table=ResultTable(["", *columns], rows),
    )


def make_missing_section(subject: Subject) -> Section:
    """Say why the SAE has no control to compare with, and how to get one."""
    control = subject.config.model.control
    lead = (
        "No control of this SAE was trained, so its scores cannot be compared with those of an SAE "
        "that learns less. python train.py -m ... sweep.controls=true trains controls on the same "
        "pass of the LLM; control=<folder> compares with any other SAE."
    )
    if control is not None:
        lead = f"This SAE is a control itself, {control.name}: {control.value}."
    return Section("Comparison with controls", lead)


def _format_score(score: Score | None, kind: ScoreKind) -> str:
    return kind.template.format(score.value) if score else ""


def _compare_features(scores: Scores, controls: Mapping[str, Scores]) -> str:
    """Say which claims hold against the control that is best at each, and which do not; empty if no
    score with a claim was measured on both."""
    better, not_better = [], []
    for name, kind in SCORE_KINDS.items():
        control_scores = [control[name] for control in controls.values() if name in control]
        if not (kind.claim and name in scores and control_scores):
            continue
        best = max(control_scores, key=lambda score: score.value)
        claim = f"{kind.claim} ({_format_score(scores[name], kind)} against "
        claim += f"{_format_score(best, kind)})"
        is_better = exceeds_noise(scores[name].samples, best.samples, paired=kind.paired)
        (better if is_better else not_better).append(claim)
    rival = next(iter(controls)) if len(controls) == 1 else "the best control"
    others = f"those of {rival}"
    merits = f"They {_join_claims(better)} better. " if better else ""
    if not_better:
        return f"This SAE's features {_join_claims(not_better)} no better than {others}. {merits}"
    return f"This SAE's features {_join_claims(better)} better than {others}. " if better else ""


def exceeds_noise(a: Sequence[float], b: Sequence[float], *, paired: bool) -> bool:
    """Whether the mean of `a` is above that of `b` in a t-test at the 5 % level; False if one of
    them has fewer than two samples. `paired`: a[i] and b[i] are measured on the same concept or
    fold."""
    samples = [[x - y for x, y in zip(a, b, strict=True)]] if paired else [a, b]
    # unpaired: the degrees of freedom of the smaller sample, so that the test errs towards False
    freedom = min(map(len, samples)) - 1
    if freedom < 1:
        return False
    standard_error = sum(variance(x) / len(x) for x in samples) ** 0.5
    return fmean(a) - fmean(b) > find_critical_t(freedom) * standard_error


def _compare_reconstructions(scores: Scores, controls: Mapping[str, Scores]) -> str:
    """Compare explained variance and L0 of the SAE with those of its best control, preferably one
    with the same L0. On synthetic concepts, also say how many are recovered."""
    valid = {name: s for name, s in controls.items() if "explained_variance" in s}
    if "explained_variance" not in scores or not valid:
        return "The explained variance is not a number, so it cannot be compared."
    same_l0 = {name: has_same_l0(s["l0"].value, scores["l0"].value) for name, s in valid.items()}
    best = max(valid, key=lambda name: (same_l0[name], valid[name]["explained_variance"].value))
    ev, best_ev = (s["explained_variance"].value for s in (scores, valid[best]))
    text = f"It explains {ev:.1%} of the variance at an L0 of {scores['l0'].value:.1f}, {best} "
    text += f"{best_ev:.1%} at an L0 of {valid[best]['l0'].value:.1f}."
    if "recovered" in scores:
        recovered = [f"{name} {s['recovered'].value:.1%}" for name, s in valid.items()]
        text += f" It recovers {scores['recovered'].value:.1%} of the concepts, "
        text += f"{', '.join(recovered)}."
    if not same_l0[best]:
        text += " As they are not equally sparse, these numbers cannot be compared: "
        text += "loss.target_l0 trains SAEs to the same L0."
    return text


def _join_claims(claims: Sequence[str]) -> str:
    *first, last = claims
    return f"{', '.join(first)} and {last}" if first else last
