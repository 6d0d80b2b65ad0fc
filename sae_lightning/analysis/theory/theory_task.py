"""`task=theory`: the claims of superposition theory."""

from collections.abc import Collection
from dataclasses import dataclass

from sae_lightning.analysis.collect import collect, excerpt
from sae_lightning.analysis.task import Task, check_at_least
from sae_lightning.analysis.theory.claims import TheoryReducer, measure_claims
from sae_lightning.analysis.theory.theory_sections import make_theory_sections


@dataclass(slots=True, kw_only=True)
class TheoryTask(Task):
    """The claims of superposition theory, tested."""

    tokens: int = 65_536
    """Tokens of text to read."""

    def __post_init__(self):
        check_at_least("tokens", self.tokens, 1024)

    def execute(self, given_settings: Collection[str]) -> None:
        subject = self.load_subject(given_settings)
        text, batch = subject.corpus.train, subject.config.llm.batch
        batches, num_sequences = excerpt(text, self.tokens, batch)
        reducer = TheoryReducer(subject)
        collect(subject, batches, [reducer], total=num_sequences)
        result = measure_claims(subject, reducer)
        self.print_and_write(subject, result.numbers, make_theory_sections(result))
