"""`task=benchmark`: scores an SAE in a published benchmark; and the table `BENCHMARKS`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_lightning.analysis.benchmarks.absorption_benchmark import run_absorption
from sae_lightning.analysis.benchmarks.benchmark_result import BenchmarkResult
from sae_lightning.analysis.benchmarks.probing_benchmark import run_probing
from sae_lightning.analysis.benchmarks.probing_sets import (
    MIN_PER_CLASS,
    USUAL_SETS,
    check_set_names,
    find_set_files,
)
from sae_lightning.analysis.subject import Subject
from sae_lightning.analysis.task import Task, as_typed, check_at_least
from sae_lightning.errors import UserError


@dataclass(slots=True, kw_only=True)
class BenchmarkTask(Task):
    """Score the SAE in a published benchmark, beside its controls."""

    suite: str = "probing"
    """The benchmark: probing or absorption."""
    sets: Any = "usual"
    """Probing: names of labelled sets such as `[96_spam_is,92_glue_sst2]`, or `all`; `usual` for a
    dozen with short texts or, if `sets_folder` is given, all in that folder."""
    sets_folder: str | None = None
    """Probing: folder with labelled sets of your own, each a file `<name>.csv` or
    `<name>.csv.zst` with the columns `prompt` and `target` (two classes); null for those of the
    package sae-probes."""
    texts: int = 1000
    """Probing: most texts to take from each set."""
    splits: int = 2
    """Probing: how often each set is split at random into texts to fit on and texts to test on."""

    def __post_init__(self):
        if self.suite not in BENCHMARKS:
            raise UserError(f"suite={self.suite}: choose from {', '.join(BENCHMARKS)}")
        names = self.sets if isinstance(self.sets, list) else [self.sets]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"sets={as_typed(self.sets)}: give usual, all, or names as sets=[a,b]")
        check_at_least("texts", self.texts, 2 * MIN_PER_CLASS)
        check_at_least("splits", self.splits, 1)

    @property
    def results_name(self) -> str:
        """A name for each benchmark, so that none overwrites another's results."""
        return f"{self.task}-{self.suite}"

    def execute(self, given_settings: Collection[str]) -> None:
        all_settings = {name for benchmark in BENCHMARKS.values() for name in benchmark.settings}
        for name in given_settings:
            if name in all_settings.difference(BENCHMARKS[self.suite].settings):
                raise UserError(f"{name} has no meaning for suite={self.suite}: leave it out")
        result, subject = self.score(given_settings)
        self.print_and_write(subject, result.numbers, result.sections)

    def score(self, given_settings: Collection[str]) -> tuple[BenchmarkResult, Subject]:
        """Open the SAE and run the benchmark on it; also add score and settings to the numbers."""
        subject = self.load_subject(given_settings)
        result = BENCHMARKS[self.suite].run(subject, self)
        settings = {name: getattr(self, name) for name in BENCHMARKS[self.suite].settings}
        numbers = {"score": result.score, "settings": settings, **result.numbers}
        return result._replace(numbers=numbers), subject


class Benchmark(NamedTuple):
    """How a benchmark is run, and which settings it has."""

    run: Callable[[Subject, BenchmarkTask], BenchmarkResult]
    settings: tuple[str, ...] = ()
    """Names of the settings of `BenchmarkTask` that only this benchmark has."""
    check: Callable[[], object] = lambda: None
    """UserError if it cannot be run with default settings; called before a search trains."""


# Value of the setting `suite` -> the benchmark.
BENCHMARKS = {
    "probing": Benchmark(
        run=lambda subject, task: run_probing(
            subject, task.sets, task.sets_folder, task.texts, task.splits
        ),
        settings=("sets", "sets_folder", "texts", "splits"),
        check=lambda: check_set_names(USUAL_SETS, find_set_files(None)),
    ),
    "absorption": Benchmark(run=lambda subject, task: run_absorption(subject)),
}
