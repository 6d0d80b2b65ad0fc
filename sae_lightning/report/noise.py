"""Which means over seeds differ by more than their noise.

Two means differ significantly if they differ by more than the larger spread, and by Welch's t-test
at the 5 % level. (Equal SAEs then seem to differ in at most 1 of 20 comparisons.) A single run
borrows the other's spread. Any difference counts between two single runs.
"""

from typing import NamedTuple

import numpy as np

# Two-sided critical values of Student's t at the 5 % level, for 1 to 30 degrees of freedom.
CRITICAL_T = np.array(
    [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
    + [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
    + [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
)


def find_critical_t(freedom: np.ndarray | float) -> np.ndarray:
    """Critical value for degrees of freedom, which are rounded down and clipped to 1 ... 30."""
    return CRITICAL_T[np.clip(freedom, 1, len(CRITICAL_T)).astype(int) - 1]


class Estimates(NamedTuple):
    """A metric of several SAEs, each with several seeds; all fields are arrays of one shape."""

    mean: np.ndarray
    spread: np.ndarray
    """Sample standard deviation over seeds; NaN for a single run."""
    seeds: np.ndarray
    """Number of runs."""

    def as_column(self) -> "Estimates":
        """All arrays as columns [n, 1], to compare all pairs."""
        return Estimates(*(values[:, None] for values in self))

    def pick(self, index: object) -> "Estimates":
        """The SAEs at `index`: anything that numpy takes as an index."""
        return Estimates(*(values[index] for values in self))


def differ_significantly(a: Estimates, b: Estimates) -> np.ndarray:
    """Whether means differ by more than their noise, bool, elementwise; False where one is NaN."""
    spread_a = np.where(np.isnan(a.spread), b.spread, a.spread)
    spread_b = np.where(np.isnan(b.spread), a.spread, b.spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance_a, variance_b = spread_a**2 / a.seeds, spread_b**2 / b.seeds
        # the degrees of freedom of Welch and Satterthwaite
        freedom = (variance_a + variance_b) ** 2 / (
            variance_a**2 / (a.seeds - 1) + variance_b**2 / (b.seeds - 1)
        )
    # a borrowed spread has the degrees of freedom of the SAE that it comes from
    is_borrowed = np.isnan(a.spread) | np.isnan(b.spread)
    freedom = np.where(is_borrowed, np.maximum(a.seeds, b.seeds) - 1, freedom)
    # freedom is NaN if neither varies: the noise is 0 then, whatever the critical value
    allowed = find_critical_t(np.nan_to_num(freedom, nan=1.0)) * np.sqrt(variance_a + variance_b)
    noise = np.nan_to_num(np.maximum(allowed, np.maximum(spread_a, spread_b)))
    return np.abs(a.mean - b.mean) > noise
