"""`task=overview`, the default: the results of all tasks that take little time on one page."""

from collections.abc import Collection
from dataclasses import dataclass

from sae_lightning.analysis.against_controls import (
    ControlReducers,
    Scores,
    make_control_section,
    make_missing_section,
    score_features,
    score_probes,
)
from sae_lightning.analysis.evaluate import Evaluation, make_scorecard_section, score_subject
from sae_lightning.analysis.open_controls import open_controls
from sae_lightning.analysis.probing import probe_sections
from sae_lightning.analysis.probing.probe_task import run_probes
from sae_lightning.analysis.probing.probes import RANDOM, Probes
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.features_task import PRINTED_FEATURES, FeaturesTask
from sae_lightning.analysis.survey.survey import (
    Survey,
    make_features_section,
    pick_most_informative,
)
from sae_lightning.analysis.theory import claims, theory_sections
from sae_lightning.analysis.theory.token_concepts import CONCEPTS
from sae_lightning.report.printer import print_lead, print_section, print_units
from sae_lightning.report.section import Section

PROBE_TOKENS = 65_536  # tokens of labelled text that probes read
PROBE_FEATURES = 32_768  # with more features, probes read fewer tokens: with twice as many, half


@dataclass(slots=True, kw_only=True)
class OverviewTask(FeaturesTask):
    """All tasks that take little time, and one page with their results."""

    control: str | None = None
    """What to compare with: a kind of control that the SAE's sweep has, such as frozen_decoder,
    `all` of them, or another SAE of the same site, given like `run`; null for the first that the
    sweep has."""

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        controls = open_controls(subject, self.control, limit=1)
        if not subject.config.data_source.has_llm:  # no text: only scorecards
            evaluation = score_subject(subject, controls=controls)
            comparison = _compare_with_controls(subject, *evaluation.list_scores())
            sections = [make_scorecard_section(evaluation), comparison]
            self.print_and_write(subject, {"evaluate": evaluation.to_dict()}, sections)
            return
        theory_reducer = claims.TheoryReducer(subject)
        control_reducers = {name: ControlReducers(subject, sae) for name, sae in controls.items()}
        pairs = [(sae, control_reducers[name].reducers) for name, sae in controls.items()]
        survey = self.make_catalogues(subject, theory_reducer, controls=pairs)
        theory = claims.measure_claims(subject, theory_reducer)
        del theory_reducer, pairs  # frees memory, which scoring needs
        feature_scores = {name: control_reducers.pop(name).result() for name in controls}
        evaluation = score_subject(subject, opened=(subject.llm, subject.corpus), controls=controls)
        summary, scorecard = make_features_section(survey), make_scorecard_section(evaluation)
        print_section(summary)
        print_units(survey.features, pick_most_informative(survey.features, PRINTED_FEATURES))
        probes = None
        tokens = PROBE_TOKENS * PROBE_FEATURES // max(PROBE_FEATURES, subject.features)
        if "speaker" in subject.config.data_source.labels:  # the packaged plays
            probes = run_probes(subject, "speaker", tokens, controls)
        scores = _gather_scores(evaluation, survey, theory, probes, feature_scores)
        parts = {
            "Scorecard": [summary, scorecard],
            "Comparison with controls": [_compare_with_controls(subject, *scores)],
            "Theory": theory_sections.make_theory_sections(theory),
            "Probes": probe_sections.make_probe_sections(probes) if probes else [],
        }
        for section in [scorecard, *parts["Theory"], *parts["Probes"]]:
            print_lead(section)
        for section in parts["Comparison with controls"]:
            print_section(section)
        results = {
            "features": survey.to_dict(),
            "evaluate": evaluation.to_dict(),
            "theory": theory.numbers,
            "probe": probes.to_dict() if probes else None,
        }
        sections = [s._replace(part=part) for part, group in parts.items() for s in group]
        catalogues = [survey.features, survey.neurons]
        self.write_results(subject, results, sections, catalogues, feature=survey.best)


def _compare_with_controls(
    subject: Subject, scores: Scores, controls: dict[str, Scores], random: Scores | None = None
) -> Section:
    if not controls:
        return make_missing_section(subject)
    return make_control_section(scores, controls, random)


def _gather_scores(
    evaluation: Evaluation,
    survey: Survey,
    theory: claims.TheoryResult,
    probes: Probes | None,
    feature_scores: dict[str, Scores],
) -> tuple[Scores, dict[str, Scores], Scores]:
    """Gather the scores of the SAE, of its controls by name, and of random directions.
    feature_scores: name of a control -> scores of its features."""
    scores, controls = evaluation.list_scores()
    f1_by_concept = {units.concept: units.feature.f1 for units in theory.detectors}
    f1 = [f1_by_concept[concept] for concept in CONCEPTS if concept in f1_by_concept]
    scores |= score_features(survey.features.token_sets.score, f1)
    for name in controls:
        controls[name] |= feature_scores[name]
        if probes is not None:
            controls[name] |= score_probes(probes, name)
    if probes is None:
        return scores, controls, {}
    return scores | score_probes(probes), controls, score_probes(probes, RANDOM)
