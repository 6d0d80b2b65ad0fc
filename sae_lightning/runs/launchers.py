"""Reads this process's rank from the variables that torchrun, srun or submitit set."""

import os
import re
from typing import NamedTuple

# Launcher -> its variables for rank, number of ranks and local rank. Slurm sets
# SLURM_STEP_NUM_TASKS only in steps that srun starts, not in a batch script.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "submitit": ("SUBMITIT_LOCAL_GLOBALRANK", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
}


class LaunchedRank(NamedTuple):
    """A process's rank, and the address at which all ranks connect."""

    rank: int
    size: int
    """Number of ranks."""
    local_rank: int
    """Number among the ranks of its machine."""
    address: str
    port: int
    launcher_listens: bool = False
    """Whether the launcher listens at the port, instead of rank 0."""
    restarts: int = 0
    """How often the launcher has restarted all ranks."""


def find_launched_rank() -> LaunchedRank | None:
    """This process's rank; None if no launcher has started it together with others."""
    for launcher, names in LAUNCHERS.items():
        if all(name in os.environ for name in names):
            rank, size, local_rank = (int(os.environ[name]) for name in names)
            address = _read_address(launcher)
            return LaunchedRank(rank, size, local_rank, *address) if size > 1 else None
    return None


def find_local_size() -> int | None:
    """Number of ranks that the launcher has started on rank 0's machine; None if unknown."""
    ranks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x2),4
    size = os.environ.get("LOCAL_WORLD_SIZE") or re.match(r"\d*", ranks_per_node)[0]
    return int(size) if size and find_launched_rank() else None


def _read_address(launcher: str) -> tuple:
    """The last fields of `LaunchedRank`, from `address` on; `launcher`: a key of LAUNCHERS."""
    env = os.environ
    if launcher == "torchrun":
        listens = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        return env["MASTER_ADDR"], int(env["MASTER_PORT"]), listens, restarts
    if launcher == "submitit":
        return "127.0.0.1", pick_port(int(env["SUBMITIT_LOCAL_JOB_ID"]))
    job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
    return find_first_host(env["SLURM_STEP_NODELIST"]), pick_port(job + step)


def pick_port(job: int) -> int:
    """A port that depends only on the number of the cluster's job, so that all its ranks agree.
    Another job most likely gets another port."""
    return 15000 + job % 10000


def find_first_host(hosts: str) -> str:
    """The first host of a list as Slurm writes it: node[03-05,9],other -> node03."""
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in first.groups())
