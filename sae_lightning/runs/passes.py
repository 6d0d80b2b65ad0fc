"""Many jobs on as few passes of the LLM as they allow.

    jobs                          stream key   steps done      passes (at most max_heads SAEs each)
    loss.l1=1e-4,seed=0           a            0           \\
    loss.l1=1e-3,seed=0           a            0            >  2 SAEs on one pass
    loss.l1=1e-4,seed=1           b            0           \\
    loss.l1=1e-3,seed=1           b            0            >  2 SAEs on another, after it
"""

import gc
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.packaged import Shape
from sae_lightning.llm.sites import Sites
from sae_lightning.runs import checks, folders, memory
from sae_lightning.runs.cli import DEBUG, explain
from sae_lightning.runs.heap import give_back_freed_memory
from sae_lightning.runs.inputs import is_text
from sae_lightning.runs.jobs import CONFIG_FILE, Job, read_job, resume_of
from sae_lightning.runs.run import run
from sae_lightning.terminal import console

Results = list[dict[str, float] | None]


class Pass(NamedTuple):
    """Jobs that train together, on one stream."""

    jobs: list[Job]
    sites: list[Sites]
    memory: int
    """Estimate in bytes."""


def train(jobs: list[Job]) -> Results:
    """Train all jobs of a multirun; the final held-out metrics of each, None where it failed.

    UserError: something is wrong with one of them; then none was started.
    """
    jobs = [_known(checks.resolved(job)) for job in jobs]
    swept = _differing(jobs)
    jobs = [replace(job, swept=swept) for job in jobs]
    _check_folders(jobs)
    results = {job.folder: _over(job) for job in jobs}
    todo = list({job.folder: job for job in jobs if not results[job.folder]}.values())
    passes = plan(todo)
    _announce(todo, passes)
    sweeps = {job.sweep for job in todo if job.sweep}
    with folders.claimed([*sweeps, *(job.folder for job in todo)]):
        for job in todo:  # from here on, the sweep can be continued
            folders.begin(job)
        for number, this in enumerate(passes, 1):
            if len(passes) > 1:
                console.print(f"\npass {number} of {len(passes)}")
            ready = [replace(job, resumed=True) for job in this.jobs]
            for job, metrics in zip(ready, _train(ready), strict=True):
                results[job.folder] = [metrics]
    return [metrics for job in jobs for metrics in results[job.folder]]


def _check_folders(jobs: list[Job]) -> None:
    """The same job twice is trained once; different ones need folders of their own."""
    first: dict[Path, Job] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job)
        if other.config.flat() != job.config.flat():
            raise UserError(
                f"hydra.sweep.subdir: jobs that differ in {_differing([other, job])[0]} would "
                f"share the folder {job.folder}; name all that is swept in it, or leave it as it is"
            )


def train_alone(job: Job) -> dict[str, float] | None:
    """Train a job of a multirun whose launcher starts each by itself; a failure is said, and
    written down for the report, and the other jobs go on."""
    try:
        return train([job])[0]
    except UserError as error:
        sys.stderr.write(f"error: {job.folder.name}: {error}\n")
        if not (job.folder / CONFIG_FILE).exists():  # else the folder is another run's
            folders.begin(job)
            folders.note_failure(job, str(error))
        return None


def _differing(jobs: list[Job]) -> list[str]:
    """The settings in which jobs differ."""
    settings = [job.config.flat() for job in jobs]
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({repr(each.get(name)) for each in settings}) > 1]


def _known(job: Job) -> Job:
    """`job`, marked as begun if this very run is in its folder already: a search may try the same
    values twice, and a sweep be started again."""
    if job.resumed or not (job.folder / CONFIG_FILE).is_file():
        return job
    there = read_job(job.folder).config
    same = there.identity() == job.config.identity() and there.eval == job.config.eval
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
    space = 0
    for job in jobs:
        streams.setdefault(job.config.stream_key(), []).append(job)
    passes, wrong = [], []
    for sharing in streams.values():
        try:
            sites, steps_done, llm, needed = checks.check(sharing)
        except UserError as error:
            wrong.append(str(error))
            continue
        space += needed
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
    if passes:
        checks.check_space(passes[0].jobs[0].folder.parent, space)
    return passes


def _split(jobs: Sequence[Job], sites: Sequence[Sites], llm: Shape) -> list[Pass]:
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
    free = memory.available(jobs[0].config)
    runs, times = _count(len(jobs), "job"), _count(len(passes), "pass")
    of = " of the LLM" if is_text(jobs[0].config) else ""
    console.print(f"{runs} on {times}{of} ({free / 1e9:.1f} GB of memory are free)")
    for number, this in enumerate(passes, 1):
        names = ", ".join(sorted({str(site) for site in this.sites}))
        saes, size = _count(len(this.jobs), "SAE"), f"{this.memory / 1e9:.1f} GB"
        more = ", more than is free" if this.memory > free else ""
        console.print(f"  pass {number}: {saes} on {names}, about {size}{more}")


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
            fewer = f"sweep.max_heads={ceil(len(jobs) / 2)}"
            reason += f"; continue with fewer: {resume_of(jobs)} {fewer}"
    except KeyboardInterrupt:
        console.print(f"interrupted. Continue with\n\n  {resume_of(jobs)}\n")
        sys.exit(130)
    except Exception as error:  # a bug, too: the other passes need not suffer from it
        reason = explain(error, [])
        if reason is None or os.environ.get(DEBUG):
            traceback.print_exc()
        reason = reason or f"{type(error).__name__}: {error}"
    finally:
        # trainer, module and callbacks refer to one another (and an error to all of them): the
        # next pass would load its LLM while this one is still in memory
        gc.collect()
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    name = f"{jobs[0].folder.name}: " if len(jobs) == 1 else ""
    sys.stderr.write(f"error: {name}{reason}\n")
    for job in jobs:
        folders.note_failure(job, reason)
    return [finished and finished["held_out"] for finished in map(folders.finished, jobs)]
