"""The scores of `suite=probing`, and their averages over sets."""

import math
from statistics import fmean, stdev
from typing import Any, NamedTuple

from numpy import ndarray

from sae_lightning.analysis.benchmarks.probing_sets import LabelledSet

SIZES = (1, 4, 16, 64)  # units of a probe
SCORED_SIZE = 16  # the mean AUROC of probes on this many units is the benchmark's score


class ProbingScores(NamedTuple):
    """Held-out AUROC of probes on k units of each kind."""

    sets: list[LabelledSet]
    aurocs: dict[str, dict[int | None, ndarray]]
    """Kind of units -> k (None: all) -> [sets, splits]. Kinds are features, neurons, random
    directions, and `control: <name>` for the features of each control."""

    def average_sets(self, kind: str, k: int | None) -> tuple[float, float]:
        """Mean AUROC over sets, and its standard error (NaN for one set)."""
        return _average(self.aurocs[kind][k].mean(1))

    def compare(self, kind: str, other: str, k: int) -> tuple[float, float]:
        """Mean over sets of the AUROC of `kind` minus that of `other`, and its standard error (NaN
        for one set)."""
        return _average((self.aurocs[kind][k] - self.aurocs[other][k]).mean(1))

    def measure_spread(self, kind: str, k: int | None) -> float:
        """Standard deviation over random splits of the mean over sets; NaN for one split."""
        means = self.aurocs[kind][k].mean(0).tolist()
        return stdev(means) if len(means) > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The content of `benchmark-probing.json`, by key."""
        sets = {s.name: {"texts": len(s.texts), "classes": s.classes} for s in self.sets}
        return {
            "auroc": {
                kind: {
                    str(k or "all"): {
                        "mean": self.average_sets(kind, k)[0],
                        "standard_error": self.average_sets(kind, k)[1],
                        "spread_over_splits": self.measure_spread(kind, k),
                        "sets": dict(zip(sets, aurocs.mean(1).tolist(), strict=True)),
                    }
                    for k, aurocs in by_k.items()
                }
                for kind, by_k in self.aurocs.items()
            },
            "sets": sets,
        }


def _average(values: ndarray) -> tuple[float, float]:
    """Mean and standard error of values [n]; the error of one value is NaN."""
    values = values.tolist()
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return fmean(values), error
