"""`task=features`: what each feature fires on."""

from collections.abc import Collection
from dataclasses import dataclass

from sae_lightning.analysis.collect import Reducer
from sae_lightning.analysis.lens import measure_effects
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.kept import describe_origin
from sae_lightning.analysis.survey.strengths import Positive
from sae_lightning.analysis.survey.survey import (
    Survey,
    make_features_section,
    pick_most_telling,
    survey,
)
from sae_lightning.analysis.task import Task, check_at_least
from sae_lightning.report.parquet import write_catalogue
from sae_lightning.report.printer import print_section, print_units

PRINTED_FEATURES = 5  # features at the terminal


@dataclass(slots=True, kw_only=True)
class FeaturesTask(Task):
    """Examples and statistics of every feature, and of every neuron of the site."""

    tokens: int = 131_072
    """Tokens of text to read."""
    examples: int = 12
    """Strongest examples of a feature; a sixth as many are drawn from each fifth of its range."""
    neurons: Positive = Positive.abs
    """How neurons are made positive, to be compared with features."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1)
        check_at_least("examples", self.examples, 1)

    def execute(self, given: Collection[str]) -> None:
        subject = self.load_subject(given)
        found = self.make_catalogues(subject)
        summary = make_features_section(found)
        print_section(summary)
        print_units(found.features, pick_most_telling(found.features, PRINTED_FEATURES))
        units = [found.features, found.neurons]
        self.publish(subject, found.scalars(), [summary], units, found.best)

    def make_catalogues(self, subject: Subject, *reducers: Reducer) -> Survey:
        """The survey with the features' effects, written as parquet files too."""
        config, text = subject.config, subject.corpus
        found = survey(
            subject,
            text.train,
            tokens=self.tokens,
            examples=self.examples,
            neurons=self.neurons,
            batch=config.llm.batch,
            seed=config.seed,
            reducers=reducers,
        )
        found = found._replace(
            features=found.features._replace(effect=measure_effects(subject, text.train))
        )
        for name, catalogue in (("features", found.features), ("neurons", found.neurons)):
            write_catalogue(
                subject.results_folder / f"{name}.parquet", catalogue, describe_origin(subject)
            )
        return found
