"""Trains the jobs of one pass of the LLM: builds stream, heads and trainer, fits, scores, saves."""

import logging
import signal
import sys
import time
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from safetensors.torch import save_file

from sae_lightning.errors import WriteError
from sae_lightning.files import write_atomically, write_json
from sae_lightning.formats.saved_format import describe_limits
from sae_lightning.llm.sites import Site, distinct_sites
from sae_lightning.ranks import world
from sae_lightning.runs.build_heads import build_heads, open_other_loggers
from sae_lightning.runs.config import Config
from sae_lightning.runs.console_output import (
    format_speed,
    print_how_to_continue,
    print_plan,
    print_results,
)
from sae_lightning.runs.folders import DENSITY_FILE, METRICS_FILE
from sae_lightning.runs.heap import keep_freed_memory
from sae_lightning.runs.jobs import format_resume_command
from sae_lightning.runs.plan import HeldOutResults, PlannedPass
from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.source import Needs, OpenedData
from sae_lightning.terminal import console
from sae_lightning.training.callbacks import make_callbacks
from sae_lightning.training.callbacks.checkpoint import export_head
from sae_lightning.training.callbacks.evaluation import evaluate_heads
from sae_lightning.training.callbacks.throughput import measure_peak_memory_gb
from sae_lightning.training.checkpoints import HeadCheckpoints
from sae_lightning.training.datamodule import ActivationData
from sae_lightning.training.head import Head
from sae_lightning.training.loggers import finish_loggers
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import Accelerator, locate_checkpoint


class RunParts(NamedTuple):
    """The objects that train a pass on this rank."""

    data: ActivationData
    module: SAEModule
    trainer: L.Trainer


def run_pass(planned: PlannedPass) -> HeldOutResults:
    """Train the SAEs of a pass on all its ranks; rank 0 has locked their run folders.

    Returns each SAE's final held-out metrics, or None if it diverged while others went on. All
    other results are in the run folders.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # drop the peak of an earlier pass
    keep_freed_memory()
    # users cannot act on Lightning's messages
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(planned.jobs[0].config.trainer.threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return _run_pass(planned)
    finally:
        torch.set_num_threads(threads)


def _run_pass(planned: PlannedPass) -> HeldOutResults:
    """Open the data, train and close the logs, with threads, warnings and memory already set."""
    config = planned.jobs[0].config
    needs = Needs(
        distinct_sites(planned.sites),
        tokens=config.eval.tokens,
        loss_tokens=config.eval.loss_tokens,
        ahead=config.trainer.batch,
        resumed=planned.jobs[0].resumed,
        own_sites=_list_own_sites(planned),
    )
    opened = config.data_source.open_data(needs)
    parts = _build_parts(planned, opened)
    print_plan(planned, opened.about)
    heads, unscored_outcome = parts.module.heads, "failed"
    try:
        open_other_loggers(planned, heads)
        return _fit(planned, parts)
    except (KeyboardInterrupt, SystemExit):
        unscored_outcome = "stopped"
        raise
    finally:
        outcomes = []
        for head in heads:
            with suppress(WriteError):  # an earlier write error has been reported
                head.log.close()
            is_scored = (head.folder / METRICS_FILE).is_file()
            outcome = "success" if is_scored else unscored_outcome
            outcome = "failed" if head.failure else outcome
            outcomes += [(logger, outcome) for logger in head.log.extra_loggers]
        finish_loggers(outcomes)


def _fit(planned: PlannedPass, parts: RunParts) -> HeldOutResults:
    """Train, score and save. If a signal stops the run, exit with 128 + its number."""
    jobs, steps_done, module = planned.jobs, planned.steps_done, parts.module
    started = time.monotonic()
    try:
        parts.trainer.fit(
            module,
            datamodule=parts.data,
            ckpt_path=locate_checkpoint(jobs[0].folder) if steps_done else None,
            weights_only=True,  # run no code from the file
        )
    finally:
        parts.data.stream.close()  # otherwise an error's traceback keeps the cache locked
    # a pass that is stopped in its last update is still scored and saved
    if module.stopped_by and module.global_step < module.steps:
        world().wait()  # until all ranks have saved
        print_how_to_continue(module)
        sys.exit(128 + module.stopped_by)
    if module.speed:
        tokens = (module.steps - steps_done) * module.batch
        module.speed["tokens_per_second_in_all"] = tokens / (time.monotonic() - started)
    try:
        results = score_and_save(planned, parts)
    except KeyboardInterrupt:
        console.print(f"interrupted. Continue with\n\n  {module.resume}\n")
        sys.exit(128 + signal.SIGINT)
    module.stopped_by = module.received_signal  # a signal during scoring
    if module.stopped_by and jobs[0].sweep_folder:  # start no other pass
        print_how_to_continue(module)
        sys.exit(128 + module.stopped_by)
    return results


def _build_parts(planned: PlannedPass, opened: OpenedData) -> RunParts:
    """Build the stream, heads, module and trainer of a pass from its jobs' configs."""
    jobs, config = planned.jobs, planned.jobs[0].config
    trainer = config.trainer
    stream = BatchStream(
        opened.rows,
        batch=trainer.batch,
        total_batches=trainer.steps,
        pool=config.data.pool,
        seed=config.seed,
        sites=_list_own_sites(planned),
    )
    heads = build_heads(planned, opened.modules)
    module = SAEModule(
        heads,
        batch=trainer.batch,
        steps=trainer.steps,
        heads_in_pass=len(jobs),
        resampling=[job.config.callbacks.resample for job in jobs],
        resume=format_resume_command(jobs),
        starts_warm=any(job.config.model.start for job in jobs),
        tuning_text=opened.tuning_text,
        tuning_starts={job.config.tuned_from for job in jobs} - {None},
    )
    data = ActivationData(stream, opened.held_out)
    return RunParts(data, module, _build_trainer(config, heads))


def _list_own_sites(planned: PlannedPass) -> list[Site]:
    """The sites of the SAEs that this rank trains."""
    return distinct_sites([planned.sites[index] for index in planned.own_share])


def _build_trainer(config: Config, heads: list[Head]) -> L.Trainer:
    """Lightning's trainer for this rank, without Lightning's loggers, bars and sanity checks."""
    trainer = config.trainer
    on_cuda = trainer.accelerator is not Accelerator.cpu and torch.cuda.is_available()
    return L.Trainer(
        accelerator=trainer.accelerator.value,
        devices=[torch.cuda.current_device()] if on_cuda else 1,
        precision=trainer.precision.value,
        max_epochs=1,
        min_epochs=0,
        max_steps=trainer.steps,
        callbacks=make_callbacks(trainer, config.eval),
        # Lightning sees one process in each rank: ignore SLURM's and torchrun's variables
        plugins=[HeadCheckpoints(heads), LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=heads[0].folder,
    )


def score_and_save(planned: PlannedPass, parts: RunParts) -> HeldOutResults:
    """Score the trained SAEs, write `density.safetensors`, `metrics.json` and `sae/`, and print the
    results. Returns each SAE's final held-out metrics, or None if it diverged."""
    module, jobs = parts.module, planned.jobs
    evaluate_heads(module.training_heads, parts.data.held_out, module.tokens_seen)
    results: dict[int, dict[str, float]] = {}
    for index, head in zip(planned.own_share, module.heads, strict=True):
        head.log.close()
        if head.failure is not None:
            continue
        export_head(head)  # on every rank, as the parts of a split head are put together
        if not head.writes:
            continue
        with write_atomically(head.folder / DENSITY_FILE) as temporary:
            save_file({"density": head.density.float()}, temporary)
        metrics = _collect_metrics(head, module)
        write_json(head.folder / METRICS_FILE, metrics)
        results[index] = head.held_out_metrics
    transcoders = [head for head in module.training_heads if head.source != head.target]
    for note in {describe_limits(head.sae) for head in transcoders} - {None}:  # about SAELens
        console.print(note)
    if len(jobs) > 1:  # the report of the sweep has their results
        if "tokens_per_second" in module.speed:
            console.print(format_speed(jobs[0], module.speed))
    elif results:  # the only job, whose metrics the loop has made
        print_results(jobs[0], metrics)
    all_results = {k: v for part in world().gather_values(results) for k, v in part.items()}
    return [all_results.get(index) for index in range(len(jobs))]


def _collect_metrics(head: Head, module: SAEModule) -> dict[str, Any]:
    """The content of `metrics.json` of an SAE that has been scored."""
    speed = {"heads": module.heads_in_pass, "peak_memory_gb": measure_peak_memory_gb()}
    metrics = {
        "tokens": module.tokens_seen,
        "held_out": head.held_out_metrics,
        "density": head.density_counts,
        "training": head.training_metrics,
        "speed": module.speed | speed,
    }
    if head.before_kl:
        metrics |= {"before_kl": head.before_kl}
    if head.fates:
        metrics |= {"start": head.start_metrics, "fates": head.fates}
    return metrics
