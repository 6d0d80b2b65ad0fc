"""Schedules: pure functions of the step. Step 0 is the first update, `total` the run's length."""


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
