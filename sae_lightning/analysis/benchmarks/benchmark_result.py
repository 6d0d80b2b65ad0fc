"""What every benchmark of `task=benchmark` returns."""

from typing import Any, NamedTuple

from sae_lightning.report.section import Section


class BenchmarkResult(NamedTuple):
    """Results of one benchmark on one SAE."""

    numbers: dict[str, Any]
    """The content of `benchmark-<name>.json`, to which `BenchmarkTask` adds score and settings."""
    sections: list[Section]
    """The results for people, the main one first."""
    score: float
    """The number that `sweep.objective=<name>` maximises; higher is better."""
