"""The plan of a pass: which jobs share it, and which rank trains which of them."""

from collections.abc import Sequence
from typing import NamedTuple

from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import SitePair
from sae_lightning.ranks import world
from sae_lightning.runs.jobs import Job


class PlannedPass(NamedTuple):
    """Jobs that train on one pass of the LLM, with what the checks looked up."""

    jobs: list[Job]
    sites: list[SitePair]
    """The sites that each job's SAE reads and reconstructs."""
    steps_done: int
    """Updates done before the jobs were stopped, the same for all."""
    llm: LLMShape
    memory: int
    """Estimated memory in bytes."""
    shares: list[list[int]]
    """For each rank, the numbers of the jobs that it trains; see `assign_jobs`."""
    split: frozenset[int] = frozenset()
    """The jobs whose SAEs are split by features over all ranks."""

    @property
    def own(self) -> list[int]:
        """The numbers of the jobs that this rank trains."""
        return self.shares[world().rank]


HeldOutResults = list[dict[str, float] | None]


def assign_jobs(sizes: Sequence[int], split: frozenset[int], ranks: int) -> list[list[int]]:
    """Assign jobs to ranks by the jobs' sizes; returns the numbers of each rank's jobs.

    A `split` job is on every rank. The others go one by one, the largest first, to the rank with
    the smallest sum so far. A rank left without one trains a copy of the smallest, and writes
    nothing.
    """
    whole = sorted(set(range(len(sizes))) - split, key=lambda job: (-sizes[job], job))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for job in whole:
        min(shares, key=lambda share: sum(sizes[other] for other in share)).append(job)
    if whole:
        shares = [share or whole[-1:] for share in shares]
    return [sorted(split) + sorted(share) for share in shares]
