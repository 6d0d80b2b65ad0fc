"""OpenMP's wait policy, set before torch is loaded."""

import os

import psutil


def share_cores() -> None:
    """If other processes use more than half of the CPU, make waiting threads yield their cores.

    OpenMP reads the policy when torch is loaded. By default, waiting threads spin for
    milliseconds, which is 5 to 15 % faster on an idle machine. On a busy machine, they may occupy
    the core that the thread they wait for needs.
    """
    if psutil.cpu_percent(interval=0.1) > 50:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
