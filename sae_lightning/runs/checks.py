"""Checks that run before anything expensive starts."""

import os
from dataclasses import replace
from typing import NamedTuple

import torch

from sae_lightning.errors import UserError
from sae_lightning.files import read_free_space
from sae_lightning.llm.load import has_bf16
from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import SitePair, distinct_sites
from sae_lightning.runs.build_heads import make_head
from sae_lightning.runs.devices import count_threads
from sae_lightning.runs.jobs import CONFIG_FILE, FOLDER_HINT, Job
from sae_lightning.runs.starts import check_start
from sae_lightning.sae import count_parameters
from sae_lightning.sae.products import has_sparse_products
from sae_lightning.terminal import console, make_visible, quote_setting
from sae_lightning.training.integrity import check_checkpoint, open_checkpoint
from sae_lightning.training.settings import (
    Accelerator,
    Precision,
    Products,
    TrainerConfig,
    locate_checkpoint,
)


def resolve_auto(job: Job) -> Job:
    """`job` with dtype, attention and precision in place of `auto`, and a number of threads in
    place of null, so that resuming on another machine does not silently change the run."""
    trainer = job.config.trainer
    precision = trainer.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if has_bf16(_pick_device_type(trainer)) else Precision.fp32
    config = replace(
        job.config,
        llm=job.config.data_source.resolve_llm(),
        trainer=replace(
            trainer, precision=precision, threads=trainer.threads or count_threads(job.config)
        ),
    )
    return replace(job, config=config)


def _pick_device_type(trainer: TrainerConfig) -> str:
    """The type of device on which SAEs train: cpu, cuda or mps."""
    device = torch.accelerator.current_accelerator()
    return "cpu" if trainer.accelerator is Accelerator.cpu or device is None else device.type


class CheckedJob(NamedTuple):
    """A job that passed the checks, with facts that the checks read."""

    job: Job
    sites: SitePair
    """The sites that the SAE reads and reconstructs."""
    steps_done: int
    """Updates done before the run was stopped; 0 for a new run."""
    llm: LLMShape
    checkpoint_bytes: int
    """Disk space in bytes that the job's checkpoints still need."""


def check_jobs(jobs: list[Job]) -> list[CheckedJob]:
    """Check jobs that share the stream half; UserError for the first problem. Prints a warning for
    each `model.start` that was trained on another LLM."""
    config = jobs[0].config
    assert len({job.config.stream_key() for job in jobs}) == 1, "jobs must share the stream half"
    if config.trainer.accelerator is Accelerator.gpu and not torch.accelerator.is_available():
        raise UserError("trainer.accelerator=gpu: no GPU found; use trainer=cpu or trainer=auto")
    device = _pick_device_type(config.trainer)
    if config.trainer.products is Products.sparse and not has_sparse_products(device):
        raise UserError(
            f"trainer.products=sparse: {device} has dense products only here (cuda needs Triton "
            "for sparse ones); use trainer.products=auto"
        )
    for job in jobs:
        _check_folder(job)
        _check_loss_tokens(job)
        _check_kl(job)
        _check_seeds(job)
        _check_shared(job, jobs[0])
    llm = config.data_source.read_shape()
    config.data_source.check_before_loading(llm, jobs[0].resumed)
    sites = [config.data_source.find_sites(job.config.layer, llm) for job in jobs]
    config.data_source.check_data(distinct_sites(sites), config.trainer.batch)
    checked_streams: set = set()  # jobs may share a stream file, which is checked once
    steps_done = [
        _read_steps_done(job, pair, llm, checked_streams) if job.resumed else 0
        for job, pair in zip(jobs, sites, strict=True)
    ]
    warnings = [
        check_start(job.config, pair, llm)
        for job, pair, done in zip(jobs, sites, steps_done, strict=True)
        if job.config.model.start and not done  # a checkpoint replaces the start
    ]
    for warning in dict.fromkeys(filter(None, warnings)):
        console.print(make_visible(warning))
    # each job's part of the shuffle pool, at most 4 bytes a number; twice, because the old pool is
    # on disk until the new checkpoint is written
    pool_bytes = 2 * 4 * llm.width * config.data.pool * len(distinct_sites(sites)) // len(jobs)
    return [
        CheckedJob(job, pair, done, llm, _count_checkpoint_bytes(job, pair, llm) + pool_bytes)
        for job, pair, done in zip(jobs, sites, steps_done, strict=True)
    ]


def _check_folder(job: Job) -> None:
    """Make the job's folder; UserError if it is not writable or holds another run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not os.access(job.folder, os.W_OK):
        raise UserError(f"{job.folder} cannot be written to: choose another with {FOLDER_HINT}")
    if not job.resumed and (job.folder / CONFIG_FILE).exists():
        raise UserError(
            f"{job.folder} already holds a run: continue it with "
            f"{quote_setting('resume', job.folder)}, or choose another folder with {FOLDER_HINT}"
        )


def _check_shared(job: Job, first: Job) -> None:
    """UserError if a job differs from the `first` of its pass in settings of the cache or of
    devices. (They are not in the stream key, because they change no result, but a pass has only one
    value of each.)"""
    if job.config.data != first.config.data:
        raise UserError(
            "data.cache, data.cache_folder: jobs on one pass of the LLM share its cache; give all "
            "of them the same"
        )
    if job.config.trainer != first.config.trainer:
        raise UserError(
            "trainer.devices, nodes, split, patience: jobs on one pass of the LLM share them; give "
            "all of them the same"
        )


def _check_loss_tokens(job: Job) -> None:
    """UserError if `eval.loss_tokens` is typed without an LLM. (In a preset it is ignored.)"""
    for override in job.overrides:
        is_loss_tokens = override.lstrip("+").startswith("eval.loss_tokens=")
        if is_loss_tokens and not job.config.data_source.has_llm:
            raise UserError(
                f"{override} has no meaning with {job.config.data_source.where}, whose activations "
                "come from no LLM: leave it out"
            )


def _check_kl(job: Job) -> None:
    """UserError if `loss.kl` is set, but no LLM or only its first blocks would be loaded."""
    config = job.config
    if config.loss.kl and not config.data_source.has_llm:
        raise UserError(
            f"loss.kl={config.loss.kl} is measured on an LLM's predictions, and with "
            f"{config.data_source.where} there is no LLM: leave it out"
        )
    if config.loss.kl and not config.eval.loss_tokens:
        raise UserError(
            f"loss.kl={config.loss.kl} needs the whole LLM, and with eval.loss_tokens=0 only the "
            "blocks up to the SAE are loaded: leave one of them out"
        )


def _check_seeds(job: Job) -> None:
    """UserError if a seed is typed and `data.seed` equals `model.seed`: the SAE's first weights
    would be the synthetic concepts."""
    seed = job.config.model.seed
    is_typed = any("seed=" in override for override in job.overrides)
    if getattr(job.config.data, "seed", None) == seed and is_typed and not job.resumed:
        raise UserError(
            f"data.seed={seed}: an SAE with model.seed={seed} would start at the very "
            "concepts that it has to find; give another seed"
        )


def _count_checkpoint_bytes(job: Job, sites: SitePair, llm: LLMShape) -> int:
    """Bytes still needed for the checkpoint (weights and Adam's two moments), the exported weights
    and the SAEs of `trainer.keep_every`. While a file is replaced, it is on disk twice."""
    weight_bytes = 4 * count_parameters(job.config.model, *map(llm.width_at, sites))
    needed = 2 * (3 * weight_bytes + weight_bytes) + job.config.trainer.kept_saes * weight_bytes
    if job.config.model.start:  # the checkpoint also has decoder rows in half precision
        needed += 2 * 2 * job.config.model.features * llm.width_at(sites.target)
    saes = [*job.folder.glob("sae/*"), *job.folder.glob("sae-*/*")]
    existing_files = [locate_checkpoint(job.folder), *saes]
    return needed - sum(file.stat().st_size for file in existing_files if file.is_file())


def check_disk_space(jobs: list[CheckedJob]) -> None:
    """UserError if the disk has fewer bytes free than the checkpoints of all jobs need."""
    needed, folder = sum(checked.checkpoint_bytes for checked in jobs), jobs[0].job.folder
    folder = folder if len(jobs) == 1 else folder.parent  # of the run or the sweep
    free = read_free_space(folder)
    if free < needed:
        raise UserError(
            f"no space left: checkpoints in {folder} need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; free some, or choose another disk with {FOLDER_HINT}"
        )


def _read_steps_done(job: Job, sites: SitePair, llm: LLMShape, checked_streams: set) -> int:
    """Check the checkpoint of a resumed run, and return the updates done; 0 if the run was killed
    before its first checkpoint. UserError if a part is damaged or the settings differ.
    `checked_streams` collects the stream files that have been checked."""
    path = locate_checkpoint(job.folder)
    try:
        path.lstat()  # not exists(), which hides broken symbolic links and disk errors
    except FileNotFoundError:
        return 0
    checkpoint, source = open_checkpoint(job.folder), job.config.data_source
    expected, settings = job.config.list_fixed_settings(), checkpoint["settings"]
    differing_names = [k for k in expected | settings if expected.get(k) != settings.get(k)]
    if differing_names:
        name, count = min(differing_names, key=str), len(differing_names)
        note = f" ({count} settings differ)" if count > 1 else ""
        raise UserError(
            f"{path} does not fit {CONFIG_FILE}: it was made with {name}={settings.get(name)}, not "
            f"{expected.get(name)}{note}"
        )
    check_checkpoint(
        checkpoint,
        make_head=lambda: make_head(job, sites, llm),
        steps=job.config.trainer.steps,
        check_stream=lambda state, done: source.check_stream_state(state, sites, llm, done),
        checked_streams=checked_streams,
    )
    return checkpoint["global_step"]
