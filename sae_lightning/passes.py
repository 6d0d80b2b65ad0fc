"""Many jobs on as few passes of the LLM as they allow.

    jobs                          stream key   steps done      passes (at most max_heads SAEs each)
    loss.l1=1e-4,seed=0           a            0           \\
    loss.l1=1e-3,seed=0           a            0            >  2 SAEs on one pass
    loss.l1=1e-4,seed=1           b            0           \\
    loss.l1=1e-3,seed=1           b            0            >  2 SAEs on another, after it
"""

import sys
import traceback
from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from typing import NamedTuple

import torch

from sae_lightning import checks, folders, memory
from sae_lightning.config import CONFIG_FILE, Job, read_job
from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Site
from sae_lightning.run import run
from sae_lightning.terminal import console, resume_command

Results = list[dict[str, float] | None]


class Pass(NamedTuple):
    """Jobs that train together, on one stream."""

    jobs: list[Job]
    sites: list[Site]

    @property
    def memory(self) -> str:
        """The estimate, for a person."""
        return f"{memory.needed([job.config for job in self.jobs], self.sites) / 1e9:.1f} GB"


def train(jobs: list[Job]) -> Results:
    """Train all jobs of a multirun; the final held-out metrics of each, None where it failed.

    UserError: something is wrong with one of them; then none was started.
    """
    jobs = [_known(checks.resolved(job)) for job in jobs]
    results = {job.folder: _over(job) for job in jobs}
    todo = list({job.folder: job for job in jobs if not results[job.folder]}.values())
    passes = plan(todo)
    _announce(todo, passes)
    with folders.claimed(sorted({job.sweep for job in todo if job.sweep})):
        for job in todo:  # from here on, the sweep can be continued
            folders.begin(job)
        for number, this in enumerate(passes, 1):
            if len(passes) > 1:
                console.print(f"\npass {number} of {len(passes)}")
            ready = [replace(job, resumed=True) for job in this.jobs]
            for job, metrics in zip(ready, _train(ready), strict=True):
                results[job.folder] = [metrics]
    return [metrics for job in jobs for metrics in results[job.folder]]


def _known(job: Job) -> Job:
    """`job`, marked as begun if this very run is in its folder already: a search may try the same
    values twice."""
    if job.resumed or not (job.folder / CONFIG_FILE).is_file():
        return job
    same = read_job(job.folder).config.identity() == job.config.identity()
    return replace(job, resumed=same)


def _over(job: Job) -> Results:
    """[metrics] of a job that need not be trained any more, [None] of one that cannot be."""
    if not job.resumed:
        return []
    if finished := folders.finished(job):
        console.print(f"{job.name} is finished")
        return [finished["held_out"]]
    failure = folders.failure(job.folder)
    if failure and failure["diverged"]:
        console.print(f"{job.name} had failed: {failure['reason']}")
        return [None]
    return []


def plan(jobs: Iterable[Job]) -> list[Pass]:
    """The passes that train `jobs`; UserError if any of them cannot be trained as it is."""
    streams: dict[str, list[Job]] = {}
    for job in jobs:
        streams.setdefault(job.config.stream_key(), []).append(job)
    groups: dict[tuple[str, int], Pass] = {}
    wrong = []
    for key, sharing in streams.items():
        try:
            sites, steps = checks.check(sharing)
        except UserError as error:
            wrong.append(str(error))
            continue
        # runs of a killed sweep may have come to different points
        for job, site, done in zip(sharing, sites, steps, strict=True):
            group = groups.setdefault((key, done), Pass([], []))
            group.jobs.append(job)
            group.sites.append(site)
    if len(wrong) > 1:
        raise UserError("nothing was started:\n  " + "\n  ".join(wrong))
    if wrong:
        raise UserError(wrong[0])
    return [part for group in groups.values() for part in _split(group)]


def _split(group: Pass) -> list[Pass]:
    """`group` in parts of about equal size, none with more SAEs than asked for or than fit."""
    count = len(group.jobs)
    if count == 1:
        return [group]
    configs = [job.config for job in group.jobs]
    asked = min((c.sweep.max_heads for c in configs if c.sweep.max_heads), default=None)
    parts = ceil(count / (asked or memory.fitting(configs, group.sites)[0]))
    ends = [count * n // parts for n in range(parts + 1)]
    return [Pass(group.jobs[a:b], group.sites[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def _announce(jobs: list[Job], passes: list[Pass]) -> None:
    if not jobs:
        return
    free = f"{memory.available(jobs[0].config) / 1e9:.1f} GB"
    runs, times = _count(len(jobs), "job"), _count(len(passes), "pass")
    console.print(f"{runs} on {times} of the LLM ({free} of memory are free)")
    for number, this in enumerate(passes, 1):
        names = ", ".join(sorted({str(site) for site in this.sites}))
        saes = _count(len(this.jobs), "SAE")
        console.print(f"  pass {number}: {saes} on {names}, about {this.memory}")


def _count(n: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"


def _train(jobs: list[Job]) -> Results:
    """Train the jobs of one pass; if it fails, say and write down why, for the next to go on."""
    try:
        return run(jobs)
    except torch.OutOfMemoryError:
        reason = f"out of memory with {len(jobs)} SAEs on one pass"
        if len(jobs) > 1:
            sweep = resume_command(jobs[0].sweep, sweep=True)
            reason += f"; continue with fewer: {sweep} sweep.max_heads={ceil(len(jobs) / 2)}"
    except UserError as error:
        reason = str(error)
    except Exception as error:  # a bug: the other passes need not suffer from it
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        sweep = resume_command(jobs[0].sweep, sweep=True)
        console.print(f"interrupted. Continue with\n\n  {sweep}\n")
        sys.exit(130)
    name = f"{jobs[0].name}: " if len(jobs) == 1 else ""
    sys.stderr.write(f"error: {name}{reason}\n")
    for job in jobs:
        folders.note_failure(job, reason)
    return [None] * len(jobs)
