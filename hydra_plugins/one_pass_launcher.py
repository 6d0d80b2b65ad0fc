"""`hydra/launcher=one_pass`, the default: the jobs of a sweep share passes of the LLM."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from sae_lightning.runs.cli import remove_unused_folder
from sae_lightning.runs.expansion import average_objective, describe_expansion, expand_jobs
from sae_lightning.runs.jobs import Job, make_jobs, read_overrides, read_swept_settings
from sae_lightning.terminal import console, phase


class OnePassLauncher(Launcher):
    """Composes all jobs of a `launch` call, then trains them on as few passes as possible."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the objects that Hydra passes to a launcher."""
        self.context, self.config, self.task_function = hydra_context, config, task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train the jobs, with the seeds and controls that they ask for. The value of a job is its
        mean objective over seeds, or None if one of its seeds failed."""
        setup_globals()
        composed: list[tuple[DictConfig, JobReturn]] = []
        try:
            with phase("composing the jobs", total=len(job_overrides)) as advance:
                for index, overrides in enumerate(job_overrides, initial_job_idx):
                    composed.append(self._compose(index, list(overrides)))
                    advance(1)
            # with resume=<sweep>, one of Hydra's jobs becomes several of our jobs
            entries = [
                (config, job_return, job)
                for config, job_return in composed
                for job in job_return.return_value
            ]
            groups = expand_jobs([job for _, _, job in entries])  # each job with its added runs
            if line := describe_expansion(groups):
                console.print(line)
            with phase("starting"):  # imported late, so that wrong settings are reported at once
                from sae_lightning.analysis.benchmarks.benchmark_objective import train_and_score

            for config, _, _ in entries:
                self.context.callbacks.on_job_start(config=config, task_function=self.task_function)
            jobs = [job for group in groups for job in group]
            metrics = train_and_score(jobs)
            results = dict(zip([job.folder for job in jobs], metrics, strict=True))
        finally:
            for config, _ in composed:
                remove_unused_folder(Path(config.hydra.runtime.output_dir))
        # a search expects one value for each job that it asked for
        is_search = not self.config.hydra.sweeper._target_.endswith(".BasicSweeper")
        job_returns = []
        for (config, composed_return, _), group in zip(entries, groups, strict=True):
            objective = average_objective(group, results)
            returned_jobs = group[:1] if is_search else group
            for job in returned_jobs:
                job_return = copy(composed_return)
                job_return.overrides, job_return.working_dir = job.overrides, str(job.folder)
                job_return.return_value = objective
                self.context.callbacks.on_job_end(config=config, job_return=job_return)
                job_returns.append(job_return)
        return job_returns

    def _compose(self, index: int, overrides: list[str]) -> tuple[DictConfig, JobReturn]:
        """Compose one of Hydra's jobs; `JobReturn.return_value` is the list of our jobs."""
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = index

        def collect(cfg: DictConfig) -> list[Job]:
            hydra = HydraConfig.get()
            sweep_folder, folder = Path(hydra.sweep.dir), Path(hydra.runtime.output_dir)
            jobs = make_jobs(cfg, folder, read_overrides(hydra), sweep_folder)
            return [replace(job, swept=read_swept_settings(hydra)) for job in jobs]

        job_return = run_job(
            task_function=collect,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            # without callbacks, which `launch` calls when training starts and ends
            hydra_context=HydraContext(self.context.config_loader, Callbacks()),
        )
        if job_return.status is JobStatus.FAILED:
            remove_unused_folder(Path(config.hydra.runtime.output_dir))
            raise job_return._return_value  # `return_value` would also print a line
        return config, job_return
