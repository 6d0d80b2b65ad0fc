"""`task=features`: what each feature fires on."""

from collections.abc import Collection
from dataclasses import dataclass

from sae_lightning.analysis.collect import Reducer
from sae_lightning.analysis.lens import effects
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.kept import identity
from sae_lightning.analysis.survey.strengths import Positive
from sae_lightning.analysis.survey.survey import Survey, most_telling, section, survey
from sae_lightning.analysis.task import Task, at_least, results
from sae_lightning.report.parquet import write_catalogue
from sae_lightning.report.printer import print_section, print_units

SHOWN = 5  # features at the terminal


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
        at_least("tokens", self.tokens, 1)
        at_least("examples", self.examples, 1)

    def answer(self, given: Collection[str]) -> None:
        subject = self.open(given)
        found = self.surveyed(subject)
        summary = section(found)
        print_section(summary)
        print_units(found.features, most_telling(found.features, SHOWN))
        units = [found.features, found.neurons]
        self.publish(subject, found.scalars(), [summary], units, found.best)

    def surveyed(self, subject: Subject, *reducers: Reducer) -> Survey:
        """The survey with the features' effects, written as parquet files too."""
        config, text = subject.config, subject.text
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
            features=found.features._replace(effect=effects(subject, text.train))
        )
        for name, catalogue in (("features", found.features), ("neurons", found.neurons)):
            write_catalogue(results(subject) / f"{name}.parquet", catalogue, identity(subject))
        return found
