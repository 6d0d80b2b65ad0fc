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
    """For each job, a group: the job and the runs that `sweep.seeds` and `sweep.controls` add to
    it. If two jobs add the same run, both groups hold the same object."""
    runs = {_make_key(job.config): job for job in jobs}
    groups = []
    for job in jobs:
        added = [runs.setdefault(_make_key(run.config), run) for run in _make_added_runs(job)]
        groups.append([job, *added])
    return groups


def list_controls(config: Config) -> list[Control]:
    """The controls that the SAE of `config` can have; UserError if there are none."""
    allowed, reason = [], ""
    for control in Control:
        try:  # the config refuses a control that has no meaning for this SAE
            replace(config, model=replace(config.model, control=control))
            allowed.append(control)
        except UserError as error:
            reason = str(error)
    if not allowed:
        raise UserError(f"sweep.controls=true: {reason}")
    return allowed


def describe_expansion(groups: Sequence[Sequence[Job]]) -> str:
    """One line that counts the runs in the `groups` of `expand_jobs`; empty if none was added."""
    job_folders = {group[0].folder for group in groups}
    runs = {run.folder: run for group in groups for run in group}
    if len(runs) == len(job_folders):
        return ""
    controls = sum(run.config.model.control is not None for run in runs.values())
    saes = f"{len(runs) - controls} SAEs with all seeds"
    return f"{len(job_folders)} jobs become {len(runs)} runs: {saes}, {controls} controls"


def average_objective(
    group: Sequence[Job], results: Mapping[Path, dict[str, float] | None]
) -> float | None:
    """Mean objective of a job over its seeds; None if the run with one of the seeds has failed.

    `group`: the job and its added runs (controls do not count); `results`: run folder -> held-out
    metrics.
    """
    config = group[0].config
    seed_runs = [run for run in group if run.config.model.control is config.model.control]
    seed_folders = dict.fromkeys(run.folder for run in seed_runs)  # PCA is one run for all seeds
    seed_metrics = [results[folder] for folder in seed_folders]
    if None in seed_metrics:
        return None
    objectives = [compute_objective(metrics, config.sweep) for metrics in seed_metrics]
    return sum(objectives) / len(objectives)


def _make_added_runs(job: Job) -> Iterator[Job]:
    """Make the runs that the job's sweep settings add to it, seed by seed."""
    if job.resumed:  # its sweep added them when it began
        return
    config = job.config
    for seed in range(config.model.seed, config.model.seed + config.sweep.seeds):
        seed_job = job
        if seed != config.model.seed:
            seed_job = _copy_job(job, "seed", seed)
            yield seed_job
        if config.sweep.controls and config.model.control is None:
            for control in list_controls(config):
                yield _copy_job(seed_job, "control", control)


def _copy_job(job: Job, setting: str, value: Control | int) -> Job:
    """`job` with another `model.<setting>`, also in its overrides, in a folder beside it."""
    model = replace(job.config.model, **{setting: value})
    name = f"model.{setting}"
    override = f"{name}={value.name if isinstance(value, Control) else value}"
    other_overrides = [o for o in job.overrides if o.lstrip("+").split("=")[0] != name]
    # if the folder's name has this setting, replace its value there
    folder, replaced = re.subn(rf"(^|,){name}=[^,]*", rf"\1{override}", job.folder.name)
    return replace(
        job,
        config=replace(job.config, model=model),
        folder=job.folder.with_name(folder if replaced else f"{job.folder.name},{override}"),
        overrides=[*other_overrides, override],
    )


def _make_key(config: Config) -> str:
    """A key that is the same for runs that train the same SAE."""
    settings = config.to_flat_dict()
    if config.model.control is Control.pca:  # draws nothing at random
        del settings["model.seed"]
    compared = {k: v for k, v in settings.items() if not k.startswith(("sweep.", "logger."))}
    return json.dumps(compared, sort_keys=True)
