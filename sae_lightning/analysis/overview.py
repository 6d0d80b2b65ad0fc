"""`task=overview`, the default: the results of all cheap tasks on one page."""

from collections.abc import Collection
from dataclasses import dataclass

from sae_lightning.analysis import evaluate
from sae_lightning.analysis.probing import probe_sections
from sae_lightning.analysis.probing.probe_task import run_probes
from sae_lightning.analysis.survey.features_task import PRINTED_FEATURES, FeaturesTask
from sae_lightning.analysis.survey.survey import make_features_section, pick_most_telling
from sae_lightning.analysis.theory import claims, theory_sections
from sae_lightning.report.printer import print_lead, print_section, print_units

PROBE_TOKENS = 65_536  # of labelled text, for an SAE of up to PROBE_FEATURES features
PROBE_FEATURES = 32_768  # with twice as many features, half as many tokens are read


@dataclass(slots=True, kw_only=True)
class OverviewTask(FeaturesTask):
    """All cheap tasks, and one page with their results."""

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        if not subject.config.data_source.has_llm:  # without text there is only a scorecard
            card = evaluate.score_subject(subject)
            self.print_and_publish(
                subject, {"evaluate": card.scalars()}, [evaluate.make_scorecard_section(card)]
            )
            return
        text = subject.corpus
        reducers = claims.TheoryReducers(subject)
        survey = self.make_catalogues(subject, reducers)
        theory = claims.theory(subject, reducers)
        del reducers  # 14 KB a feature, which scoring can use
        card = evaluate.score_subject(subject, opened=(subject.llm, text))
        summary, scorecard = make_features_section(survey), evaluate.make_scorecard_section(card)
        print_section(summary)
        print_units(survey.features, pick_most_telling(survey.features, PRINTED_FEATURES))
        probes = None
        tokens = PROBE_TOKENS * PROBE_FEATURES // max(PROBE_FEATURES, subject.features)
        if "speaker" in subject.config.data_source.labels:
            probes = run_probes(subject, "speaker", tokens)
        parts = {
            "Scorecard": [summary, scorecard],
            "Theory": theory_sections.make_theory_sections(theory),
            "Probes": probe_sections.make_probe_sections(probes) if probes else [],
        }
        for section in [scorecard, *parts["Theory"], *parts["Probes"]]:
            print_lead(section)
        scalars = {
            "features": survey.scalars(),
            "evaluate": card.scalars(),
            "theory": theory.numbers,
            "probe": probes and probes.scalars(),
        }
        sections = [s._replace(part=part) for part, members in parts.items() for s in members]
        self.publish(subject, scalars, sections, [survey.features, survey.neurons], survey.best)
