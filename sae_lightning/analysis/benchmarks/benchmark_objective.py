"""Trains jobs, and scores the SAEs in a benchmark if that is the objective of their search
(`sweep.objective=probing`)."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_lightning.errors import UserError
from sae_lightning.runs.folders import METRICS_FILE, read_json
from sae_lightning.runs.jobs import Job
from sae_lightning.runs.passes import train_jobs
from sae_lightning.runs.search import BENCHMARK_OBJECTIVES
from sae_lightning.terminal import console, make_visible


def train_and_score(jobs: Sequence[Job]) -> list[dict[str, float] | None]:
    """Train the jobs as `train_jobs` does. If the objective of a job's search is the score of a
    benchmark, add that score to the job's metrics. Jobs that failed, and controls that the sweep
    added, get no score.

    UserError, before training: the benchmark cannot be run here."""
    # a minus in front means that the search minimises the score
    objectives = [(job.config.sweep.objective or "").removeprefix("-") for job in jobs]
    benchmarks = BENCHMARK_OBJECTIVES.intersection(objectives)
    if benchmarks:
        from sae_lightning.analysis.benchmarks.benchmark_task import BENCHMARKS

        for name in benchmarks:
            BENCHMARKS[name].check()
    all_metrics = train_jobs(jobs)
    for job, objective, metrics in zip(jobs, objectives, all_metrics, strict=True):
        is_added_control = job.config.sweep.controls and job.config.model.control is not None
        if objective in benchmarks and metrics is not None and not is_added_control:
            metrics[objective] = score_job(job, objective)
    return all_metrics


def score_job(job: Job, name: str) -> float:
    """Run the benchmark `name` with default settings on the SAE of a job, and write page and
    numbers into its run folder. If the folder already has them, only read the score."""
    from sae_lightning.analysis.benchmarks.benchmark_task import BENCHMARKS, BenchmarkTask

    config = job.config
    groups = {"llm": config.llm, "data": config.data, "layer": config.layer}
    task = BenchmarkTask(run=str(job.folder), task="benchmark", suite=name, **groups)
    settings = {key: getattr(task, key) for key in BENCHMARKS[name].settings}
    saved_score = _read_score(job.folder, f"{task.results_name}.json", settings)
    if saved_score is not None:
        console.print(make_visible(f"{job.folder} already has its score in suite={name}"))
        return saved_score
    result, subject = task.score(given_settings=())
    task.write_results(subject, result.numbers, result.sections)
    return result.score


def _read_score(run: Path, file_name: str, settings: dict[str, Any]) -> float | None:
    """The score in a results file of the run folder `run`; None if the file is missing, unreadable,
    older than the end of the run, or made with other settings."""
    path = run / "analysis" / file_name
    with suppress(FileNotFoundError, UserError):
        if path.stat().st_mtime < (run / METRICS_FILE).stat().st_mtime:
            return None
        numbers = read_json(path)
        if isinstance(numbers, dict) and numbers.get("settings") == settings:
            score = numbers.get("score")
            return score if isinstance(score, float) else None
    return None
