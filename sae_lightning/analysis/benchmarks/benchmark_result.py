"""What every benchmark of `task=benchmark` returns."""

from typing import Any, NamedTuple

from sae_lightning.report.section import Section


class BenchmarkResult(NamedTuple):
    """Results of one benchmark on one SAE."""

    numbers: dict[str, Any]
    """For `benchmark-<name>.json`, to which `BenchmarkTask` adds the score and the settings."""
    sections: list[Section]
    """The results for people, the main one first."""
    score: float
    """The number that `sweep.objective=<name>` maximises; higher is better."""
