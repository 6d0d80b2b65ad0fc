"""Many jobs on as few passes of the LLM as they allow.

    jobs                          stream key   steps done      passes (at most max_heads SAEs each)
    loss.l1=1e-4,seed=0           a            0           \\
    loss.l1=1e-3,seed=0           a            0            >  2 SAEs on one pass
    loss.l1=1e-4,seed=1           b            0           \\
    loss.l1=1e-3,seed=1           b            0            >  2 SAEs on another, after it
"""

import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import torch

from sae_lightning import checks, folders, memory
from sae_lightning.config import CONFIG_FILE, Job, read_job
from sae_lightning.errors import UserError
from sae_lightning.llm.packaged import Shape
from sae_lightning.llm.sites import Site
from sae_lightning.run import run
from sae_lightning.terminal import console, resume_command

Results = list[dict[str, float] | None]


class Pass(NamedTuple):
    """Jobs that train together, on one stream."""

    jobs: list[Job]
    sites: list[Site]
    memory: int
    """Estimate in bytes."""


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
    passes, wrong = [], []
    for sharing in streams.values():
        try:
            sites, steps_done, llm = checks.check(sharing)
        except UserError as error:
            wrong.append(str(error))
            continue
        # runs of a killed sweep may have come to different points
        for done in dict.fromkeys(steps_done):
            group = [
                pair for *pair, mine in zip(sharing, sites, steps_done, strict=True) if mine == done
            ]
            passes += _split(*zip(*group, strict=True), llm)
    if len(wrong) > 1:
        raise UserError("nothing was started:\n  " + "\n  ".join(wrong))
    if wrong:
        raise UserError(wrong[0])
    return passes


def _split(jobs: Sequence[Job], sites: Sequence[Site], llm: Shape) -> list[Pass]:
    """Passes of about equal size, none with more SAEs than asked for or, else, than fit."""
    configs = [job.config for job in jobs]
    needed = memory.estimate(configs, sites, llm)
    most = min((c.sweep.max_heads for c in configs if c.sweep.max_heads), default=None)
    if most is None:
        room = 0.9 * memory.available(configs[0]) - needed.shared
        most = max(1, int(room // max(needed.heads)))
    parts = ceil(len(jobs) / most)
    ends = [len(jobs) * n // parts for n in range(parts + 1)]
    return [
        Pass(list(jobs[a:b]), list(sites[a:b]), needed.shared + sum(needed.heads[a:b]))
        for a, b in pairwise(ends)
    ]


def _announce(jobs: list[Job], passes: list[Pass]) -> None:
    if not jobs:
        return
    free = f"{memory.available(jobs[0].config) / 1e9:.1f} GB"
    runs, times = _count(len(jobs), "job"), _count(len(passes), "pass")
    console.print(f"{runs} on {times} of the LLM ({free} of memory are free)")
    for number, this in enumerate(passes, 1):
        names = ", ".join(sorted({str(site) for site in this.sites}))
        saes, size = _count(len(this.jobs), "SAE"), f"{this.memory / 1e9:.1f} GB"
        console.print(f"  pass {number}: {saes} on {names}, about {size}")


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
