"""Trains jobs on as few passes of the LLM as possible; all training starts here.

    jobs                          stream key   steps done      passes (with sweep.max_heads=2)
    loss.l1=1e-4,seed=0           a            0           \\
    loss.l1=1e-3,seed=0           a            0            >  2 SAEs on one pass
    loss.l1=1e-4,seed=1           b            0           \\
    loss.l1=1e-3,seed=1           b            0            >  2 SAEs on another, after it
"""

import gc
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from math import ceil
from pathlib import Path

import torch

from sae_lightning.errors import UserError, WriteError, is_out_of_memory
from sae_lightning.files import remove_leftovers
from sae_lightning.ranks import RankLost
from sae_lightning.runs import checks, folders, memory
from sae_lightning.runs.checks import CheckedJob
from sae_lightning.runs.cli import SEVERAL_ERRORS, explain_error, print_error
from sae_lightning.runs.config import Config
from sae_lightning.runs.devices import OUT_OF_MEMORY, count_local_ranks, count_ranks, run_on_ranks
from sae_lightning.runs.heap import give_back_freed_memory
from sae_lightning.runs.hparams import make_hparams
from sae_lightning.runs.jobs import CONFIG_FILE, Job, format_resume_command, read_job
from sae_lightning.runs.launchers import find_launched_rank
from sae_lightning.runs.plan import (
    HeldOutResults,
    PlannedPass,
    assign_jobs,
    cut_evenly,
    cut_groups,
    find_leaders,
    group_by_leader,
)
from sae_lightning.runs.starts import forget_starts
from sae_lightning.terminal import console, make_visible
from sae_lightning.training.settings import Accelerator, Splitting


def train_jobs(jobs: Sequence[Job]) -> HeldOutResults:
    """Train the job of a plain run, or all jobs of a multirun. Returns each job's final
    held-out metrics, or None if it failed.

    If a pass of a multirun fails, the reason is printed and the next pass starts; in a plain run,
    the error is raised. UserError, before anything starts, if one of the jobs is invalid.
    """
    jobs = [_resume_if_begun(checks.resolve_auto(job)) for job in jobs]
    jobs = [replace(job, hparams=h) for job, h in zip(jobs, make_hparams(jobs), strict=True)]
    _check_folders(jobs)
    results = _read_earlier_results(jobs)
    todo = list({job.folder: job for job in jobs if job.folder not in results}.values())
    try:
        passes = plan_passes(todo)
    except UserError as error:
        # without a sweep folder, Hydra starts the jobs of a multirun one by one: it goes on after
        # this error, which the sweep's report must show
        if jobs[0].multirun and not jobs[0].sweep_folder:
            folders.record_refusal(todo[0], str(error))
        raise
    if todo and todo[0].multirun:
        _announce_passes(todo, passes)
    sweeps = {job.sweep_folder for job in todo if job.sweep_folder}
    with folders.claim_folders([*sweeps, *(job.folder for job in todo)]):
        for job in todo:  # from here on, jobs can be resumed
            folders.begin_run(job)
        for number, planned in enumerate(passes, 1):
            if len(passes) > 1:
                console.print(f"\npass {number} of {len(passes)}")
            if planned.jobs[0].multirun:
                # a job marked as resumed goes on without a cache if the disk is full; if its pass
                # fails after the job has finished, its metrics are read
                planned = planned._replace(jobs=[replace(j, resumed=True) for j in planned.jobs])
            for job, metrics in zip(planned.jobs, _train_pass(planned), strict=True):
                results[job.folder] = metrics
    return [results[job.folder] for job in jobs]


def _check_folders(jobs: list[Job]) -> None:
    """UserError if different jobs share a folder. (The same job twice is trained once.)"""
    by_folder: dict[Path, Job] = {}
    for job in jobs:
        settings = job.config.to_flat_dict()
        earlier = by_folder.setdefault(job.folder, job).config.to_flat_dict()
        if names := [k for k in earlier | settings if earlier.get(k) != settings.get(k)]:
            raise UserError(
                f"hydra.sweep.subdir: jobs that differ in {names[0]} would share the folder "
                f"{job.folder}; number them: hydra.sweep.subdir='${{hydra:job.num}}'"
            )


def _resume_if_begun(job: Job) -> Job:
    """`job`, marked as resumed if its multirun has begun the same run already: a search may try the
    same values twice, and a sweep may be restarted."""
    if job.resumed or not job.multirun or not (job.folder / CONFIG_FILE).is_file():
        return job
    # trusted: no LLM is loaded, so none of its code can run
    saved, config = read_job(job.folder, trusted=True).config, job.config
    same_settings = saved.list_fixed_settings() == config.list_fixed_settings()
    return replace(job, resumed=same_settings and saved.eval == config.eval)


def _read_earlier_results(jobs: Iterable[Job]) -> dict[Path, dict[str, float] | None]:
    """Folder -> held-out metrics of each resumed job that has finished, or None if it diverged;
    jobs that are still to be trained are left out. UserError if a plain run had diverged."""
    results, resumed_jobs = {}, [job for job in jobs if job.resumed]
    for job in resumed_jobs:
        failure = folders.read_failure(job.folder)
        if metrics := folders.read_earlier_metrics(job):
            remove_leftovers(job.folder)  # a killed run may have left temporary files
            console.print(f"{make_visible(str(job.folder))} is finished")
            results[job.folder] = metrics["held_out"]
        elif failure and failure["diverged"]:
            message = f"{job.folder} had failed: {failure['reason']}"
            if not job.multirun:
                raise UserError(message)
            console.print(make_visible(message))
            results[job.folder] = None
    return results


def plan_passes(jobs: Iterable[Job]) -> list[PlannedPass]:
    """The passes that train `jobs`; UserError, with one line per stream key, for invalid jobs."""
    by_stream: dict[str, list[Job]] = {}
    for job in jobs:
        by_stream.setdefault(job.config.stream_key(), []).append(job)
    groups: dict[tuple[str, int], list[CheckedJob]] = {}
    errors, controls_lost_leader = [], False
    for key, stream_jobs in by_stream.items():
        try:
            checked_jobs = checks.check_jobs(stream_jobs)
        except UserError as error:
            errors.append(str(error))
            continue
        for checked, leader in zip(checked_jobs, find_leaders(stream_jobs), strict=True):
            # runs of a killed sweep may have stopped at different steps
            groups.setdefault((key, checked.steps_done), []).append(checked)
            if leader is not None and checked_jobs[leader].steps_done != checked.steps_done:
                controls_lost_leader = True
    if errors:
        lines = "\n  ".join(map(make_visible, errors))
        raise UserError((SEVERAL_ERRORS if len(errors) > 1 else "") + lines)
    if groups:
        checks.check_disk_space([checked for group in groups.values() for checked in group])
    forget_starts()
    if controls_lost_leader:
        console.print(
            "some controls were saved at another update than their SAEs and train on another pass: "
            "they keep to the last known L0 of the SAE instead of following it, and may end at "
            "another L0"
        )
    return [planned for group in groups.values() for planned in _split_group(group)]


def _split_group(group: list[CheckedJob]) -> list[PlannedPass]:
    """Split jobs with the same stream and steps done into passes of about equal size, each with at
    most `sweep.max_heads` SAEs or, by default, as many as fit into free memory. An SAE and the
    controls that follow its L0 share a pass and a rank if they fit on one."""
    jobs, sites = [checked.job for checked in group], [checked.sites for checked in group]
    configs, llm = [job.config for job in jobs], group[0].llm
    splitting, leader_groups = configs[0].trainer.split, group_by_leader(jobs)
    ranks, free = count_ranks(configs[0]), _read_free_memory_per_rank(configs[0])
    needed = memory.estimate_memory(configs, sites, llm, ranks)
    max_heads = min((c.sweep.max_heads for c in configs if c.sweep.max_heads), default=None)
    if max_heads is None:
        # ranks that share one SAE if it is split
        ranks_per_sae = 1 if splitting is Splitting.none else ranks
        memory.check_memory(needed, configs, sites, llm, free, ranks_per_sae)
        largest_bytes = max(needed.head_bytes) / (ranks if splitting is Splitting.all else 1)
        left = 0.9 * free - needed.shared_bytes  # a tenth in reserve: these are estimates
        saes_per_rank = max(1, int(left // (largest_bytes + needed.hidden_bytes)))
        rank_groups = cut_groups(leader_groups, saes_per_rank)
        max_heads = saes_per_rank  # with split=all, each rank has a part of every SAE
        if splitting is not Splitting.all:  # whole groups on each rank
            largest_group = max(map(len, rank_groups))
            groups_per_rank = saes_per_rank // largest_group
            max_heads = ranks * groups_per_rank * largest_group
    else:
        rank_groups = cut_groups(leader_groups, max_heads)
    if len(rank_groups) > len(leader_groups):
        console.print(
            "too many controls to train together with their SAEs: some keep their own sparsity "
            "coefficients instead of following the L0 of the SAE"
        )
    group_lists = cut_evenly(rank_groups, max_heads)  # one list for each pass
    return [_plan_pass(group, groups_in_pass, needed, free) for groups_in_pass in group_lists]


def _plan_pass(
    group: list[CheckedJob], rank_groups: list[list[int]], needed: memory.PassMemory, free: float
) -> PlannedPass:
    """Plan a pass of some jobs of `group`. `rank_groups` has their indices in `group`, one list for
    jobs that share a rank; `needed`: the memory of all jobs of `group`."""
    indices = [*chain(*rank_groups)]
    jobs, sites = [group[index].job for index in indices], [group[index].sites for index in indices]
    config, ranks = jobs[0].config, count_ranks(jobs[0].config)
    needed = needed._replace(head_bytes=[needed.head_bytes[index] for index in indices])
    split = frozenset(
        index
        for index, job in enumerate(jobs)
        if 1 < ranks <= job.config.model.features  # each rank needs a feature
        and _is_split(config.trainer.split, len(jobs), needed.count_bytes([index]), free)
    )
    index_in_pass = {index: position for position, index in enumerate(indices)}
    pass_groups = [[index_in_pass[index] for index in rank_group] for rank_group in rank_groups]
    shares = assign_jobs(needed.head_bytes, split, ranks, pass_groups)
    largest = max(needed.count_bytes(share, split, ranks) for share in shares)
    return PlannedPass(jobs, sites, group[0].steps_done, group[0].llm, largest, shares, split)


def _read_free_memory_per_rank(config: Config) -> float:
    """Free memory for each rank, in bytes."""
    free = memory.read_free_memory(config)
    if config.trainer.accelerator is Accelerator.cpu or not torch.cuda.is_available():
        free /= count_local_ranks(config)  # on CPUs, ranks share the machine's memory
    return free


def _is_split(choice: Splitting, heads_in_pass: int, needed: int, free: float) -> bool:
    """Whether to split an SAE, which takes `needed` of the `free` bytes on one rank. With `auto`,
    split it if it does not fit, or if it is alone on its pass: other ranks would be idle."""
    if choice is Splitting.auto:
        return heads_in_pass == 1 or needed > free
    return choice is Splitting.all


def _announce_passes(jobs: list[Job], passes: list[PlannedPass]) -> None:
    """Print the number of jobs and, of each pass, its SAEs, sites and memory."""
    free = _read_free_memory_per_rank(jobs[0].config)
    job_count, pass_count = _format_count(len(jobs), "job"), _format_count(len(passes), "pass")
    of_llm = " of the LLM" if jobs[0].config.data_source.has_llm else ""
    devices = len(passes[0].shares)
    per_device = f" for each of {devices} devices" if devices > 1 else ""
    memory_line = f"{free / 1e9:.1f} GB of memory are free{per_device}"
    console.print(f"{job_count} on {pass_count}{of_llm} ({memory_line})")
    for number, planned in enumerate(passes, 1):
        sites = ", ".join(sorted({str(site) for site in planned.sites}))
        controls = sum(job.config.model.control is not None for job in planned.jobs)
        saes, size = _format_count(len(planned.jobs) - controls, "SAE"), planned.memory / 1e9
        saes += f" and {_format_count(controls, 'control')}" if controls else ""
        more = ", more than is free" if planned.memory > free else ""
        console.print(f"  pass {number}: {saes} on {sites}, about {size:.1f} GB{more}")


def _format_count(n: int, noun: str) -> str:
    """`1 job`, `2 jobs` or `2 passes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"


def _train_pass(planned: PlannedPass) -> HeldOutResults:
    """Train the jobs of a pass. If it fails, record the reason; in a multirun, print it and return
    the metrics of the jobs that finished before, and None for the others."""
    jobs = planned.jobs
    try:
        return run_on_ranks(planned)
    except KeyboardInterrupt:
        if folders.forget_empty_run(jobs[0]):
            raise
        console.print(f"interrupted. Continue with\n\n  {format_resume_command(jobs)}\n")
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except Exception as error:  # even a bug must not stop other passes
        no_memory = is_out_of_memory(error) or str(error).endswith(OUT_OF_MEMORY)  # of another rank
        reason = _describe_out_of_memory(jobs) if no_memory else explain_error(error, [])
        if not folders.forget_empty_run(jobs[0]):
            has_config = (jobs[0].folder / CONFIG_FILE).is_file()  # else, nothing to resume
            if isinstance(error, WriteError | RankLost) and has_config:
                correct = "correct this and " if isinstance(error, WriteError) else ""
                reason = f"{error}; {correct}continue with: {format_resume_command(jobs)}"
            for job in jobs:
                folders.record_failure(job, reason or f"{type(error).__name__}: {error}")
        if not jobs[0].multirun:
            if reason:
                raise UserError(reason) from error
            raise
        print_error(reason, jobs[0].folder.name if len(jobs) == 1 else None)
        if find_launched_rank():  # only the launcher can start its ranks again
            sys.exit(f"error: this pass failed; continue with: {format_resume_command(jobs)}")
    finally:
        # trainer, module and callbacks (and an error's traceback) form reference cycles: without
        # gc.collect, the next pass would load its LLM while the old one is still in memory
        gc.collect()
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [metrics and metrics["held_out"] for metrics in map(folders.read_earlier_metrics, jobs)]


def _describe_out_of_memory(jobs: list[Job]) -> str:
    """One line with the settings to lower or, for several jobs, the command with a smaller pass."""
    reason = f"out of memory with {_format_count(len(jobs), 'SAE')} on one pass"
    if len(jobs) == 1:
        return f"{reason}; lower model.features, trainer.batch, data.pool or llm.batch"
    fewer = f"sweep.max_heads={ceil(len(jobs) / 2)}"
    return f"{reason}; continue with fewer: {format_resume_command(jobs)} {fewer}"
