"""How the threads of matrix products wait for one another."""

import os

import psutil


def share_cores() -> None:
    """Where others use more than half of the cores, let threads that wait leave theirs.

    OpenMP reads this when torch is loaded. Its threads spin for milliseconds, which is faster by
    some percent alone; beside others they keep from the core the very thread that they wait for.
    """
    if psutil.cpu_percent(interval=0.1) > 50:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
