"""Schedules: pure functions of the step. Step 0 is the first update, `total` the run's length."""

import math


def warmup(step: int, total: int, share: float) -> float:
    """Factor that rises linearly to 1 over the first `share` of the run, then stays."""
    length = share * total
    return 1.0 if step + 1 >= length else (step + 1) / length


def decay(step: int, total: int, share: float) -> float:
    """Factor that stays 1, then falls linearly towards 0 over the last `share` of the run."""
    length = share * total
    left = total - step
    return 1.0 if left >= length else left / length


def due(step: int, batch: int, every: int) -> bool:
    """Whether update number `step` (from 1) of `batch` tokens reaches a multiple of `every`."""
    return step * batch // every > (step - 1) * batch // every


def steered(l0: float, target: float, rate: float = 0.02) -> float:
    """Factor by which a sparsity coefficient grows after an update with `l0` active features.

    exp(rate x log(l0 / target)), the logarithm bounded by -1 and 1: an integral controller in
    logarithms, since L0 falls about as a power of the coefficient. It does not overshoot for long
    because L0 follows within some tens of updates while the coefficient needs 1 / rate for a
    factor e.
    """
    error = math.log(max(l0, 1e-9) / target)
    return math.exp(rate * min(max(error, -1.0), 1.0))
