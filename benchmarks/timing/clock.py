"""The clock of the benchmarks, for our runs and those of other tools; imports nothing of ours."""

from time import perf_counter

import torch


def read_clock() -> float:
    """Seconds on the clock, read once the GPU has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()
