"""`hydra/launcher=one_pass`, the default: jobs share passes of the LLM if they can."""

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
from sae_lightning.runs.jobs import Job, make_jobs, read_overrides, read_swept_settings
from sae_lightning.runs.search import compute_objective
from sae_lightning.terminal import phase


class OnePassLauncher(Launcher):
    """Composes all jobs of a `launch` call, then trains them on as few passes as possible."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what Hydra passes to a launcher."""
        self.context, self.config, self.task_function = hydra_context, config, task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train the jobs; each return value is the objective, or None if the job failed."""
        setup_globals()
        composed: list[tuple[DictConfig, JobReturn]] = []
        try:
            with phase("composing the jobs", total=len(job_overrides)) as advance:
                for number, overrides in enumerate(job_overrides, initial_job_idx):
                    composed.append(self._compose(number, list(overrides)))
                    advance(1)
            # one entry per run: a job with resume=<sweep> has several
            runs = [
                (config, copy(ret), job) for config, ret in composed for job in ret.return_value
            ]
            with phase("starting"):  # imported late, so that wrong settings are reported at once
                from sae_lightning.runs.passes import train_jobs

            for config, *_ in runs:
                self.context.callbacks.on_job_start(config=config, task_function=self.task_function)
            results = train_jobs([job for *_, job in runs])
        finally:
            self._remove_unused([config for config, _ in composed])
        for (config, ret, job), metrics in zip(runs, results, strict=True):
            ret.overrides, ret.working_dir = job.overrides, str(job.folder)
            ret.return_value = (
                None if metrics is None else compute_objective(metrics, job.config.sweep)
            )
            self.context.callbacks.on_job_end(config=config, job_return=ret)
        return [ret for _, ret, _ in runs]

    def _remove_unused(self, configs: list[DictConfig]) -> None:
        """Remove the folders that Hydra made and that hold no run."""
        for config in configs:
            remove_unused_folder(Path(config.hydra.runtime.output_dir))

    def _compose(self, number: int, overrides: list[str]) -> tuple[DictConfig, JobReturn]:
        """Compose a job as Hydra does; it returns the list of our jobs instead of training them."""
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number

        def collect(cfg: DictConfig) -> list[Job]:
            hydra = HydraConfig.get()
            sweep, folder = Path(hydra.sweep.dir), Path(hydra.runtime.output_dir)
            jobs = make_jobs(cfg, folder, read_overrides(hydra), sweep)
            return [replace(job, swept=read_swept_settings(hydra)) for job in jobs]

        done = run_job(
            task_function=collect,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            # no callbacks yet: `launch` calls them when training starts and ends
            hydra_context=HydraContext(self.context.config_loader, Callbacks()),
        )
        if done.status is JobStatus.FAILED:
            self._remove_unused([config])
            raise done._return_value
        return config, done
