"""Schedules: pure functions. `step` counts updates, of which the run has `total`."""

import math


def compute_warmup(step: int, total: int, share: float) -> float:
    """Factor that rises linearly to 1 over the first `share` of the run, then stays 1."""
    length = share * total
    # + 1: the first update already has a factor above 0
    return 1.0 if step + 1 >= length else (step + 1) / length


def compute_decay(step: int, total: int, share: float) -> float:
    """Factor that stays 1, then falls linearly towards 0 over the last `share` of the run."""
    length = share * total
    remaining = total - step  # the coming update included, so that no factor is 0
    return 1.0 if remaining >= length else remaining / length


def find_tuning_start(total: int, share: float) -> int:
    """The update, counted from 0, at which fine-tuning begins after `share` of the run; at the
    latest, its last update."""
    return min(round(share * total), total - 1)


def is_due(step: int, batch: int, every: int) -> bool:
    """Whether update `step` (counted from 1, of `batch` tokens) reaches a multiple of `every`
    tokens."""
    return step * batch // every > (step - 1) * batch // every


def measure_l0_error(l0: float, target: float) -> float:
    """log(L0 / target), clamped to [-1, 1]; 1e-9 in place of 0 for either."""
    return min(max(math.log(max(l0, 1e-9) / max(target, 1e-9)), -1.0), 1.0)


def compute_feedback(error: float, last_error: float, step: int, total: int) -> float:
    """Factor by which a sparsity coefficient is multiplied after update `step` of `total`, given
    `measure_l0_error` at this update and at the last one.

    exp(30 * step^2 / total^3 * error + (error - last_error)): a proportional-integral controller in
    logarithms, since L0 falls roughly as a power of the coefficient. In the middle of the run, a
    constant error of 1 (L0 off by a factor e) changes the coefficient by a factor e within about an
    eighth of the run, slowly enough for L0 to follow. Earlier, the first term is smaller, because
    L0 then falls by itself. The second term responds at once and prevents overshooting.
    """
    return math.exp(30 * step**2 / total**3 * error + (error - last_error))
