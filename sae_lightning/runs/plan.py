"""The plan of a pass: which jobs share it, and which rank trains which of them."""

import sys
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


def find_leaders(jobs: Sequence[Job]) -> list[int | None]:
    """For each control whose coefficient is to be steered, the number of the trained SAE whose L0
    it follows: of the same experiment and seed. None for all other jobs."""
    keys = [(identify_experiment(job.config.to_flat_dict()), job.config.model.seed) for job in jobs]
    is_control = [job.config.model.control is not None for job in jobs]
    trained = {key: n for n, key in enumerate(keys) if not is_control[n]}
    return [
        trained.get(key) if control and job.config.loss.fixes_coefficient else None
        for job, key, control in zip(jobs, keys, is_control, strict=True)
    ]


def count_followers(jobs: Sequence[Job]) -> int:
    """Number of controls that can follow the L0 of an SAE among the jobs."""
    return sum(leader is not None for leader in find_leaders(jobs))


def group_partners(jobs: Sequence[Job], most: int = sys.maxsize) -> list[list[int]]:
    """Numbers of the jobs, in groups that belong on one rank: a trained SAE, then the controls that
    follow its L0. Most groups are a single job. Groups of more than `most` are cut."""
    groups: dict[int, list[int]] = {}
    for number, partner in enumerate(find_leaders(jobs)):
        if partner is None:
            groups.setdefault(number, []).insert(0, number)
        else:
            groups.setdefault(partner, []).append(number)
    return [g[n : n + most] for g in groups.values() for n in range(0, len(g), most)]


def cut_evenly(groups: Sequence[list[int]], most: int) -> list[list[list[int]]]:
    """Cut a sequence of groups into as few parts as possible, of about equal size, with at most
    `most` jobs each. No group has more, and none is cut."""
    total, ends = sum(map(len, groups)), [0, *accumulate(map(len, groups))]
    for parts in range(ceil(total / most), total):
        limits = [total * n // parts for n in range(parts + 1)]
        cuts = [bisect(ends, limit) - 1 for limit in limits]
        cut = [[*groups[a:b]] for a, b in pairwise(cuts) if b > a]
        if all(sum(map(len, part)) <= most for part in cut):
            return cut
    return [[group] for group in groups]


def assign_jobs(
    sizes: Sequence[int],
    split: frozenset[int],
    ranks: int,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Assign jobs to ranks by the jobs' sizes; returns the numbers of each rank's jobs.

    A `split` job is on every rank. The others go group by group (None: each is one), the largest
    first, to the rank with the smallest sum so far. A rank left without one trains a copy of the
    smallest, and writes nothing.
    """

    def add_up(numbers: Iterable[int]) -> int:
        return sum(sizes[number] for number in numbers)

    groups = groups or [[number] for number in range(len(sizes))]
    whole = [group for each in groups if (group := [n for n in each if n not in split])]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(whole, key=add_up, reverse=True):
        min(shares, key=add_up).extend(group)
    if whole:
        smallest = min(chain(*whole), key=lambda number: (sizes[number], -number))
        shares = [share or [smallest] for share in shares]
    return [sorted(split) + sorted(share) for share in shares]
