"""`task=features`: what each feature fires on, with examples and statistics."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sae_lightning.analysis.collect import Reducer
from sae_lightning.analysis.lens import measure_effects
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.survey.saved_catalogue import describe_origin, read_saved_catalogue
from sae_lightning.analysis.survey.strengths import Positive
from sae_lightning.analysis.survey.survey import (
    Survey,
    make_features_section,
    pick_most_informative,
    survey,
)
from sae_lightning.analysis.task import Task, check_at_least
from sae_lightning.report.catalogue import Catalogue
from sae_lightning.report.parquet import write_catalogue
from sae_lightning.report.printer import print_section, print_units
from sae_lightning.sae import SAE

PRINTED_FEATURES = 5  # features shown in the terminal
CATALOGUE_SETTINGS = {"tokens", "examples", "neurons"}  # those that change a catalogue


@dataclass(slots=True, kw_only=True)
class FeaturesTask(Task):
    """Examples and statistics of every feature, and of every neuron of the site."""

    tokens: int = 131_072
    """Tokens of text to read."""
    examples: int = 12
    """Strongest examples to keep of each feature. In addition, a sixth as many are drawn at random
    from each of five equal intervals of its strength."""
    neurons: Positive = Positive.abs
    """How neurons are made positive, so that they can be compared with features."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1)
        check_at_least("examples", self.examples, 1)

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        result = self.make_catalogues(subject)
        summary = make_features_section(result)
        print_section(summary)
        print_units(result.features, pick_most_informative(result.features, PRINTED_FEATURES))
        catalogues = [result.features, result.neurons]
        self.write_results(subject, result.to_dict(), [summary], catalogues, result.best)

    def find_catalogue(self, subject: Subject, given_settings: Collection[str]) -> Catalogue:
        """Read the catalogue of features that an earlier task has saved. Make a new one if there is
        no usable file, or if a setting in CATALOGUE_SETTINGS is given."""
        saved = None
        if not CATALOGUE_SETTINGS & {*given_settings}:
            saved = read_saved_catalogue(subject, subject.results_folder / "features.parquet")
        return saved or self.make_catalogues(subject).features

    def make_catalogues(
        self,
        subject: Subject,
        *reducers: Reducer,
        controls: Iterable[tuple[SAE, Iterable[Reducer]]] = (),
    ) -> Survey:
        """Survey the text, measure the features' effects on the logits, and write both catalogues
        as parquet files. `reducers` and `controls` (SAEs with reducers) take part in the pass."""
        config, text = subject.config, subject.corpus
        result = survey(
            subject,
            text.train,
            tokens=self.tokens,
            examples=self.examples,
            neurons=self.neurons,
            batch=config.llm.batch,
            seed=config.seed,
            reducers=reducers,
            controls=controls,
        )
        effect = measure_effects(subject, text.train)
        result = result._replace(features=result.features._replace(effect=effect))
        origin = describe_origin(subject)
        for catalogue in (result.features, result.neurons):
            file = subject.results_folder / f"{catalogue.kind}s.parquet"
            write_catalogue(file, catalogue, origin)
        return result
