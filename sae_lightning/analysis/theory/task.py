"""`task=theory`: the claims of superposition theory."""

from collections.abc import Collection
from dataclasses import dataclass

from sae_lightning.analysis.collect import collect, excerpt
from sae_lightning.analysis.task import Task, at_least
from sae_lightning.analysis.theory.claims import TheoryReducers, theory
from sae_lightning.analysis.theory.sections import sections
from sae_lightning.analysis.trained import open_reader


@dataclass(slots=True, kw_only=True)
class TheoryTask(Task):
    """The claims of superposition theory, tested."""

    tokens: int = 65_536
    """Tokens of text to read."""

    def __post_init__(self):
        at_least("tokens", self.tokens, 1024)

    def answer(self, given: Collection[str]) -> None:
        trained = self.open(given)
        subject, text = open_reader(trained)
        reducers = TheoryReducers(subject)
        parts, total = excerpt(text.train, self.tokens, trained.config.llm.batch)
        collect(subject, parts, [reducers], total=total)
        result = theory(subject, reducers)
        self.finish(trained, result.numbers, sections(result))
