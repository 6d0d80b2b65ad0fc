"""The plan of a pass: its jobs, and the ranks that train them."""

from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from math import ceil
from typing import NamedTuple

from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import SitePair
from sae_lightning.ranks import world
from sae_lightning.report.experiments import identify_experiment
from sae_lightning.runs.jobs import Job


class PlannedPass(NamedTuple):
    """Jobs that train on one pass of the LLM, and on which ranks."""

    jobs: list[Job]
    sites: list[SitePair]
    """The sites that each job's SAE reads and reconstructs."""
    steps_done: int
    """Updates done before the jobs were stopped, the same for all."""
    llm: LLMShape
    memory: int
    """Estimated memory in bytes, of the rank that needs most."""
    shares: list[list[int]]
    """For each rank, the indices of the jobs that it trains; see `assign_jobs`."""
    split: frozenset[int] = frozenset()
    """Indices of the jobs whose SAEs are split by features over all ranks."""

    @property
    def own_share(self) -> list[int]:
        """The indices of the jobs that this rank trains."""
        return self.shares[world().rank]


# For each job, its final held-out metrics, or None if it failed.
HeldOutResults = list[dict[str, float] | None]


def find_leaders(jobs: Sequence[Job]) -> list[int | None]:
    """For each control that follows the L0 of an SAE, the index of its leader: the trained SAE with
    the same settings and seed. None for other jobs, and if the leader is not among `jobs`."""
    keys = [(identify_experiment(job.config.to_flat_dict()), job.config.model.seed) for job in jobs]
    is_control = [job.config.model.control is not None for job in jobs]
    sae_indices = {key: index for index, key in enumerate(keys) if not is_control[index]}
    return [  # a control with `model.k` or `loss.target_l0` has no leader
        sae_indices.get(key) if control and job.config.loss.fixes_coefficient else None
        for job, key, control in zip(jobs, keys, is_control, strict=True)
    ]


def group_by_leader(jobs: Sequence[Job]) -> list[list[int]]:
    """Indices of the jobs, in groups that should share a rank: an SAE, then the controls that it
    leads. Most groups are a single job."""
    groups: dict[int, list[int]] = {}
    for index, leader in enumerate(find_leaders(jobs)):
        if leader is None:
            groups.setdefault(index, []).insert(0, index)
        else:
            groups.setdefault(leader, []).append(index)
    return [*groups.values()]


def cut_groups(groups: Iterable[list[int]], most: int) -> list[list[int]]:
    """The groups; a group of more than `most` jobs is cut into several."""
    return [group[n : n + most] for group in groups for n in range(0, len(group), most)]


def cut_evenly(groups: Sequence[list[int]], most: int) -> list[list[list[int]]]:
    """Cut a sequence of groups into as few parts as possible, of about equal size, with at most
    `most` jobs each. The groups stay whole, so none may have more than `most` jobs."""
    total = sum(map(len, groups))
    ends = [0, *accumulate(map(len, groups))]  # number of jobs in the first n groups
    for part_count in range(ceil(total / most), total):
        limits = [total * n // part_count for n in range(part_count + 1)]  # in jobs
        cuts = [bisect(ends, limit) - 1 for limit in limits]  # whole groups up to each limit
        parts = [[*groups[a:b]] for a, b in pairwise(cuts) if b > a]
        if all(sum(map(len, part)) <= most for part in parts):
            return parts
    return [[group] for group in groups]


def assign_jobs(
    sizes: Sequence[int],
    split: frozenset[int],
    ranks: int,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Assign jobs to ranks by the jobs' sizes; returns the indices of each rank's jobs.

    A `split` job is on every rank. Whole jobs go group by group (None: every job is a group), the
    largest group first, to the rank with the smallest sum so far. A rank without a whole job trains
    a copy of the smallest one, and does not write it.
    """

    def add_up(indices: Iterable[int]) -> int:
        return sum(sizes[index] for index in indices)

    groups = groups or [[index] for index in range(len(sizes))]
    groups = [[index for index in group if index not in split] for group in groups]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=add_up, reverse=True):
        min(shares, key=add_up).extend(group)
    if any(groups):
        # -index: the last of several that are equally small
        smallest = min(chain(*groups), key=lambda index: (sizes[index], -index))
        shares = [share or [smallest] for share in shares]
    return [sorted(split) + sorted(share) for share in shares]
