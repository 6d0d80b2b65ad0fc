"""Trains jobs whose objective may be the score of a benchmark (`sweep.objective=probing`)."""

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
    """Train the jobs as `train_jobs` does and, if their search maximises the score of a benchmark,
    add it to the metrics of each job; the controls that a sweep adds are not scored.

    UserError, before training: the benchmark cannot be run here."""
    names = [(job.config.sweep.objective or "").removeprefix("-") for job in jobs]
    if benchmarks := BENCHMARK_OBJECTIVES.intersection(names):
        from sae_lightning.analysis.benchmarks.benchmark_task import BENCHMARKS

        for name in benchmarks:
            BENCHMARKS[name].check()
    all_metrics = train_jobs(jobs)
    for job, name, metrics in zip(jobs, names, all_metrics, strict=True):
        is_added = job.config.sweep.controls and job.config.model.control is not None
        if name in benchmarks and metrics is not None and not is_added:
            metrics[name] = score_job(job, name)
    return all_metrics


def score_job(job: Job, suite: str) -> float:
    """Run a suite with its default settings on a trained SAE; its page and numbers go into the run
    folder. If they are there since the SAE was trained, the score is read from them."""
    from sae_lightning.analysis.benchmarks.benchmark_task import BENCHMARKS, BenchmarkTask

    config = job.config
    groups = {"llm": config.llm, "data": config.data, "layer": config.layer}
    task = BenchmarkTask(run=str(job.folder), task="benchmark", suite=suite, **groups)
    settings = {name: getattr(task, name) for name in BENCHMARKS[suite].settings}
    known = _read_score(job.folder, f"{task.results_name}.json", settings)
    if known is not None:
        console.print(make_visible(f"{job.folder} has its score of suite={suite}"))
        return known
    result, subject = task.score(())
    task.publish(subject, result.numbers, result.sections)
    return result.score


def _read_score(run: Path, name: str, settings: dict[str, Any]) -> float | None:
    """The score in a file of results that was made with these settings since the run has finished;
    None without one."""
    path = run / "analysis" / name
    with suppress(FileNotFoundError, UserError):
        if path.stat().st_mtime < (run / METRICS_FILE).stat().st_mtime:
            return None
        numbers = read_json(path)
        if isinstance(numbers, dict) and numbers.get("settings") == settings:
            score = numbers.get("score")
            return score if isinstance(score, float) else None
    return None
