"""An SAE beside its controls: do its features do more than those that never learned?

    text, read once -> SAE     -> survey, theory, probes -> Scores \\
                    -> control -> ControlReducers        -> Scores  -> make_control_section
    held-out text   -> both    -> scorecards             -> Scores /

A random dictionary of the same size does surprisingly well on the usual scores (Korznikov et al.
2026, 2602.14111), so a score says something about an SAE only beside that of its control.
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
    """What the value is the mean of; empty for sums over all held-out data."""


class ScoreKind(NamedTuple):
    """How a score is shown, and what it says of features."""

    label: str
    template: str
    """A format string."""
    claim: str = ""
    """What features with a higher score do better; empty if the score makes no such claim."""
    paired: bool = False
    """Whether the samples of two SAEs belong together one by one, as those of concepts do."""


SCORE_KINDS = {
    "l0": ScoreKind("L0", "{:.1f}"),
    "explained_variance": ScoreKind("EV", "{:.3f}"),
    "ce_recovered": ScoreKind("CE recovered", "{:.3f}"),
    "kl": ScoreKind("KL (nats)", "{:.4f}"),
    "features_share": ScoreKind("CE: features", "{:.1%}"),
    "error_share": ScoreKind("CE: error", "{:.1%}"),
    "recovered": ScoreKind("concepts recovered", "{:.1%}"),
    "token_score": ScoreKind("token score", "{:.2f}", "match token sets"),
    "token_like": ScoreKind("  above 0.5", "{:.0%}"),
    "concepts": ScoreKind("concepts, F1", "{:.2f}", "detect concepts", paired=True),
    **{
        f"probe_{k}": ScoreKind(
            f"speakers, k = {k}",
            "{:.3f}",
            f"tell speakers apart {'one by one' if k == 1 else f'in groups of {k}'}",
            paired=True,
        )
        for k in CONTROL_K
    },
}
Scores = dict[str, Score]
"""Name in SCORE_KINDS -> score, of one SAE; NaNs are left out."""


class ControlReducers:
    """Reducers that collect from the text what a control's features are compared by."""

    def __init__(self, subject: Subject, sae: SAE):
        self.concepts = ConceptCounts(subject, sae.config.features)
        self.sampler = SequenceSampler(sae.config.features, subject.config.seed)

    @property
    def reducers(self) -> list[Reducer]:
        return [self.concepts, self.sampler]

    def result(self) -> Scores:
        """Scores on all text that was read."""
        counts, vocabulary = self.concepts.counts.result(), self.concepts.vocabulary
        f1 = [find_detector(counts, i).f1 for i in find_frequent_concepts(counts).values()]
        token_scores = score_token_sets(self.sampler.result(), len(vocabulary)).score
        return score_features(token_scores, f1)


def score_features(token_scores: Tensor, f1: Sequence[float]) -> Scores:
    """Scores by the token score of each feature [features], NaN where it has none, and by the F1 of
    the best feature of each concept, in the order of the list of concepts."""
    known = token_scores[~token_scores.isnan()].tolist()
    scores = {}
    if known:
        scores["token_score"] = Score(fmean(known), known)
        scores["token_like"] = Score(fmean(score > 0.5 for score in known))
    return scores | ({"concepts": Score(fmean(f1), f1)} if f1 else {})


def score_probes(probes: Probes, kind: str = FEATURES) -> Scores:
    """Scores of probes on units of a `kind`: features, random directions, or those of a control."""
    return {
        f"probe_{k}": Score(score.auroc, [fold.auroc for fold in score.folds])
        for k in CONTROL_K
        if (score := probes.find_score(kind, k)) and not math.isnan(score.auroc)
    }


def pick_scores(numbers: Mapping[str, Any]) -> Scores:
    """Scores among the numbers of a scorecard, by name."""
    return {
        name: Score(numbers[name])
        for name in SCORE_KINDS
        if not math.isnan(numbers.get(name, math.nan))
    }


def make_control_section(
    own: Scores, controls: Mapping[str, Scores], random: Mapping[str, Score] = {}
) -> Section:
    """A table of all scores, and sentences that say what the SAE does better than its controls.
    `random`: scores of random directions; empty if there are none."""
    columns = {"this SAE": own, **controls, **({RANDOM: random} if random else {})}
    rows = [
        [kind.label, *(_format_score(scores.get(name), kind) for scores in columns.values())]
        for name, kind in SCORE_KINDS.items()
        if any(name in scores for scores in (own, *controls.values()))
    ]
    kinds = [Control[name] for name in controls if name in Control.__members__]
    notes = {kind.name: kind.value for kind in kinds}
    compared = _compare_features(own, controls)
    if "features_share" in own:
        notes["CE: features, error"] = "share of what mean ablation costs that each alone recovers"
    if "concepts" in own:
        notes["concepts, F1"] = "of the best single feature for each"
    if "probe_1" in own:
        notes["speakers"] = "AUROC of probes on k features for each"
    if compared:
        notes["called better"] = (
            "the mean over features, concepts or folds is higher by more than their spread "
            "explains (t-test, 5 % level); training with another seed would add to it"
        )
    return Section(
        title="Beside a control",
        lead=compared + _compare_reconstructions(own, controls),
        numbers=notes,
        table=ResultTable(["", *columns], rows),
    )


def make_missing_section(subject: Subject) -> Section:
    """Say why the SAE has no control to compare with, and how to get one."""
    kind = subject.config.model.control
    lead = (
        "No control of this SAE was trained, so nothing here says what a dictionary that learned "
        "nothing would score. python train.py -m ... sweep.controls=true trains controls on the "
        "same pass of the LLM; control=<folder> compares with any other SAE."
    )
    if kind is not None:
        lead = f"This SAE is a control itself, {kind.name}: {kind.value}."
    return Section("Beside a control", lead)


def _format_score(score: Score | None, kind: ScoreKind) -> str:
    return kind.template.format(score.value) if score else ""


def _compare_features(own: Scores, controls: Mapping[str, Scores]) -> str:
    """Say what the features do better than those of the best control, and what they do not."""
    better, not_better = [], []
    for name, kind in SCORE_KINDS.items():
        rivals = [scores[name] for scores in controls.values() if name in scores]
        if not (kind.claim and name in own and rivals):
            continue
        rival = max(rivals, key=lambda score: score.value)
        claim = f"{kind.claim} ({_format_score(own[name], kind)} against "
        claim += f"{_format_score(rival, kind)})"
        is_better = exceeds_noise(own[name].samples, rival.samples, paired=kind.paired)
        (better if is_better else not_better).append(claim)
    others = f"those of {next(iter(controls)) if len(controls) == 1 else 'the best control'}"
    if not_better:
        rest = f"They {_join_claims(better)} better. " if better else ""
        return f"This SAE's features {_join_claims(not_better)} no better than {others}. {rest}"
    return f"This SAE's features {_join_claims(better)} better than {others}. " if better else ""


def exceeds_noise(a: Sequence[float], b: Sequence[float], *, paired: bool) -> bool:
    """Whether the mean of `a` is above that of `b` in a t-test at the 5 % level; False where there
    is only one sample. `paired`: a[i] and b[i] are measured on the same concept or fold."""
    samples = [[x - y for x, y in zip(a, b, strict=True)]] if paired else [a, b]
    freedom = min(map(len, samples)) - 1
    if freedom < 1:
        return False
    return (
        fmean(a) - fmean(b)
        > find_critical_t(freedom) * sum(variance(x) / len(x) for x in samples) ** 0.5
    )


def _compare_reconstructions(own: Scores, controls: Mapping[str, Scores]) -> str:
    """Explained variance at the L0 of the SAE and of the control that explains most; on synthetic
    concepts, also how many are recovered."""
    rivals = {name: s for name, s in controls.items() if "explained_variance" in s}
    if "explained_variance" not in own or not rivals:
        return "Their explained variance is not a number, so that it does not compare."
    same = {name: has_same_l0(s["l0"].value, own["l0"].value) for name, s in rivals.items()}
    name = max(rivals, key=lambda name: (same[name], rivals[name]["explained_variance"].value))
    ev, best_ev = (scores["explained_variance"].value for scores in (own, rivals[name]))
    text = f"It explains {ev:.1%} of the variance at an L0 of {own['l0'].value:.1f}, {name} "
    text += f"{best_ev:.1%} at an L0 of {rivals[name]['l0'].value:.1f}."
    if "recovered" in own:
        recovered = [f"{name} {scores['recovered'].value:.1%}" for name, scores in rivals.items()]
        text += f" It recovers {own['recovered'].value:.1%} of the concepts, "
        text += f"{', '.join(recovered)}."
    if not same[name]:
        text += " As they are not equally sparse, these numbers do not compare: loss.target_l0 "
        text += "trains SAEs to the same L0."
    return text


def _join_claims(claims: Sequence[str]) -> str:
    *first, last = claims
    return f"{', '.join(first)} and {last}" if first else last
