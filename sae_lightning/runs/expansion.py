"""Adds seeds and controls to the jobs of a sweep.

-m model=relu,topk sweep.seeds=2 sweep.controls=true

model=relu                        typed
model=relu,model.control=pca      added, and so on for each control
model=relu,model.seed=1           added
model=relu,model.control=frozen_decoder,model.seed=1   ...
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sae_lightning.errors import UserError
from sae_lightning.runs.config import Config
from sae_lightning.runs.jobs import Job
from sae_lightning.runs.search import compute_objective
from sae_lightning.sae.controls import Control


def expand_jobs(jobs: Sequence[Job]) -> list[list[Job]]:
    """For each job, itself and the runs that `sweep.seeds` and `sweep.controls` add to it. A run
    that several jobs ask for is the same job each time, with the same folder."""
    known = {_make_key(job.config): job for job in jobs}
    return [
        [job, *(known.setdefault(_make_key(added.config), added) for added in _list_added(job))]
        for job in jobs
    ]


def list_controls(config: Config) -> list[Control]:
    """The controls that a trained SAE can have: those that the checks of its config allow.
    UserError if there are none."""
    allowed, reason = [], ""
    for control in Control:
        try:
            replace(config, model=replace(config.model, control=control))
            allowed.append(control)
        except UserError as error:
            reason = str(error)
    if not allowed:
        raise UserError(f"sweep.controls=true: {reason}")
    return allowed


def describe_expansion(groups: Sequence[Sequence[Job]]) -> str:
    """What `expand_jobs` has added, in one line; empty if nothing."""
    typed = {group[0].folder for group in groups}
    jobs = {job.folder: job for group in groups for job in group}
    if len(jobs) == len(typed):
        return ""
    controls = sum(job.config.model.control is not None for job in jobs.values())
    seeds = f"{len(jobs) - controls} SAEs with all seeds"
    return f"{len(typed)} jobs become {len(jobs)} runs: {seeds}, {controls} controls"


def average_objective(
    group: Sequence[Job], results: Mapping[Path, dict[str, float] | None]
) -> float | None:
    """Mean objective over the seeds of a job (a group of `expand_jobs`), without its controls, from
    the held-out metrics by run folder; None if one of the runs has failed."""
    first, values = group[0].config, []
    seeds = [job.folder for job in group if job.config.model.control is first.model.control]
    for folder in dict.fromkeys(seeds):
        if (metrics := results[folder]) is None:
            return None
        values.append(compute_objective(metrics, first.sweep))
    return sum(values) / len(values)


def _list_added(job: Job) -> Iterator[Job]:
    """The runs that the job's sweep settings add to it, seed by seed."""
    if job.resumed:  # its sweep has added them when it began
        return
    config = job.config
    for seed in range(config.model.seed, config.model.seed + config.sweep.seeds):
        repetition = job
        if seed != config.model.seed:
            repetition = _change(job, "seed", seed)
            yield repetition
        if config.sweep.controls and config.model.control is None:
            for control in list_controls(config):
                yield _change(repetition, "control", control)


def _change(job: Job, setting: str, value: Control | int) -> Job:
    """`job` with another `model.<setting>`, as if that had been typed, in a folder beside it."""
    model = replace(job.config.model, **{setting: value})
    name = f"model.{setting}"
    typed = f"{name}={value.name if isinstance(value, Control) else value}"
    # in place of the typed value, if the folder is named after one
    folder, replaced = re.subn(rf"(^|,){name}=[^,]*", rf"\1{typed}", job.folder.name)
    return replace(
        job,
        config=replace(job.config, model=model),
        folder=job.folder.with_name(folder if replaced else f"{job.folder.name},{typed}"),
        overrides=[*(o for o in job.overrides if o.lstrip("+").split("=")[0] != name), typed],
    )


def _make_key(config: Config) -> str:
    """What distinguishes a run from others of the sweep. `pca` draws nothing at random, so one
    serves all seeds."""
    settings = config.to_flat_dict()
    if config.model.control is Control.pca:
        del settings["model.seed"]
    compared = {k: v for k, v in settings.items() if not k.startswith(("sweep.", "logger."))}
    return json.dumps(compared, sort_keys=True)
