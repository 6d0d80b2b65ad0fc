"""`task=benchmark`: benchmarks of the field on one SAE, and the table of suites."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from sae_lightning.analysis.benchmarks.benchmark import Benchmark
from sae_lightning.analysis.benchmarks.probing_suite import run_probing
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import Task
from sae_lightning.errors import UserError


@dataclass(slots=True, kw_only=True)
class BenchmarkTask(Task):
    """Score the SAE in a benchmark of the field, beside its controls."""

    suite: str = "probing"
    """The benchmark: probing."""

    def __post_init__(self):
        if self.suite not in BENCHMARKS:
            raise UserError(f"suite={self.suite}: choose from {', '.join(BENCHMARKS)}")

    @property
    def results_name(self) -> str:
        """A name for each suite, so that none overwrites another's results."""
        return f"{self.task}-{self.suite}"

    def execute(self, given_settings: Collection[str]) -> None:
        own = BENCHMARKS[self.suite].settings
        for name in given_settings:
            if name not in own and any(name in suite.settings for suite in BENCHMARKS.values()):
                raise UserError(f"{name} has no meaning for suite={self.suite}: leave it out")
        subject = self.load_subject(given_settings)
        result = BENCHMARKS[self.suite].run(subject, self)
        self.print_and_publish(subject, result.numbers, result.sections)


class BenchmarkSuite(NamedTuple):
    """A row of `BENCHMARKS`."""

    run: Callable[[Subject, BenchmarkTask], Benchmark]
    settings: tuple[str, ...] = ()
    """Names of the settings that only this suite has."""


BENCHMARKS = {
    "probing": BenchmarkSuite(lambda subject, task: run_probing(subject)),
}
