"""Settings of a multirun, the objective that a searching sweeper maximises, and its errors."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from traceback import walk_tb

from sae_lightning.errors import UserError
from sae_lightning.report.sweep_table import cap_recovered
from sae_lightning.scoring.duplicates import Copies
from sae_lightning.scoring.metrics import Quality

# Metrics of every kind of data; the two that are left out are not numbers.
COMMON_METRICS = {*Quality._fields, *Copies._fields} - {"density", "dimension"}
# Benchmarks (task=benchmark) whose score a search can maximise: run on each SAE once it is trained.
BENCHMARK_OBJECTIVES = frozenset({"absorption", "probing"})
# Penalty for an L0 that is e times sweep.l0 (an excess of 1 % costs 0.1). It must outweigh the gain
# of a metric from a larger L0: kl, the steepest, falls by 0.2 from L0 20 to 50 (SmolLM2, block 9).
EXCESS_L0_PENALTY = 10.0


@dataclass(slots=True, kw_only=True)
class SweepConfig:
    """Settings of a multirun as a whole; they change nothing about any SAE."""

    objective: str | None = None
    """Held-out metric, or benchmark (`probing` or `absorption`, docs/benchmarks.md), that a
    searching sweeper maximises; a minus in front minimises (`-kl`). null is ce_recovered, or
    explained_variance where the LLM's loss is not measured."""
    l0: float | None = None
    """Target L0 of the search: more active features per token lower the objective."""
    max_heads: int | None = None
    """SAEs trained together on one pass of the LLM; null for as many as memory allows."""
    controls: bool = False
    """Add to each SAE of the sweep its controls (`model.control`), with the same L0."""
    seeds: int = 1
    """Train each SAE of the sweep with this many seeds (`model.seed`)."""

    def __post_init__(self):
        if self.l0 is not None and not 0 < self.l0 < math.inf:
            raise UserError(
                f"sweep.l0={self.l0}: give a positive number of active features per token"
            )
        if self.max_heads is not None and self.max_heads < 1:
            raise UserError(f"sweep.max_heads={self.max_heads}: give 1 or more SAEs for a pass")
        if self.seeds < 1:
            raise UserError(f"sweep.seeds={self.seeds}: give 1 or more seeds")

    def check_objective(self, measured: Collection[str], where: str) -> None:
        """UserError unless the objective is a common metric or one of those `measured`; `where`,
        such as "on synthetic concepts", becomes part of the message."""
        metrics = sorted(COMMON_METRICS.union(measured))
        if self.objective is not None and self.objective.removeprefix("-") not in metrics:
            raise UserError(
                f"sweep.objective={self.objective} is not measured {where}: choose from "
                f"{', '.join(metrics)}, with a minus in front to minimise it"
            )


def compute_objective(metrics: dict[str, float], sweep: SweepConfig) -> float:
    """The number to maximise: m - EXCESS_L0_PENALTY * max(0, log(L0 / sweep.l0)).

    m is the metric, negated if `sweep.objective` begins with a minus; without `sweep.l0` nothing is
    subtracted. Metrics improve with L0, so a search settles at or just below `sweep.l0`. If the
    metric is NaN, the objective is -inf: samplers refuse NaN, and the run must not win.
    """
    default = "ce_recovered" if "ce_recovered" in metrics else "explained_variance"
    name = sweep.objective or default
    value = metrics[name.removeprefix("-")]
    if name.endswith("ce_recovered"):  # above 1, an SAE is not more faithful
        value = float(cap_recovered(value, metrics["ce_zero"], metrics["ce_clean"]))
    if math.isnan(value):
        return -math.inf
    if name.startswith("-"):
        value = -value
    if sweep.l0 is None:
        return value
    return value - EXCESS_L0_PENALTY * math.log(max(1.0, metrics["l0"] / sweep.l0))


def describe_search_error(error: BaseException) -> str | None:
    """One line about an error that Optuna or its sweeper raised; None for an error raised in our
    code, which the sweeper calls."""
    if str(error) == "No trials are completed yet.":
        return "no trial of the search succeeded, see above"
    modules = [f.f_globals.get("__name__", "") for f, _ in walk_tb(error.__traceback__)]
    is_from_sweeper = bool(modules) and "optuna_sweeper" in modules[-1]  # raised there
    if is_from_sweeper or any(name.startswith("optuna.") for name in modules):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            f"hydra/sweeper=optuna: {reason}; see its settings, such as hydra.sweeper.storage=..."
        )
    return None
