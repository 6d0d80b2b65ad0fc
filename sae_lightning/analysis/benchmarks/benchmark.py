"""What every suite of `task=benchmark` returns."""

from typing import Any, NamedTuple

from sae_lightning.report.section import Section


class Benchmark(NamedTuple):
    """Results of one suite on one SAE."""

    numbers: dict[str, Any]
    """Content of `benchmark-<suite>.json`."""
    sections: list[Section]
    """The results for people, the main one first."""
    score: float
    """The number that `sweep.objective=<suite>` maximises; higher is better."""
