"""Builds the heads that train the SAEs of a pass, and opens their logs."""

from collections.abc import Iterable

from sae_lightning.llm.packaged import LLMShape
from sae_lightning.llm.sites import Site, SitePair
from sae_lightning.ranks import ALONE, Ranks, world
from sae_lightning.runs.folders import find_sweep_folder, name_with_day
from sae_lightning.runs.jobs import Job
from sae_lightning.runs.plan import PlannedPass, find_leaders
from sae_lightning.sae import build_sae
from sae_lightning.training.head import Head
from sae_lightning.training.loggers import open_loggers
from sae_lightning.training.logging import HeadLog, LoggedRun, SilentLog


def build_heads(planned: PlannedPass, modules: dict[Site, str]) -> list[Head]:
    """The heads that this rank trains, with their logs. `modules`: site -> module name."""
    heads = []
    for index in planned.own_share:
        job, pair = planned.jobs[index], planned.sites[index]
        head = make_head(job, pair, planned.llm, world() if index in planned.split else ALONE)
        # a checkpoint replaces the start
        head.start = None if planned.steps_done else job.config.model.start
        # of several ranks that train the SAE, the first writes
        writer = next(rank for rank, share in enumerate(planned.shares) if index in share)
        head.writes = writer == world().rank
        log_type = HeadLog if head.writes else SilentLog
        head.log = log_type(job.folder, job.hparams, _find_resumed_at(planned, job))
        head.metadata |= pair.module_names(modules)
        heads.append(head)
    leaders = find_leaders([planned.jobs[index] for index in planned.own_share])
    for head, leader in zip(heads, leaders, strict=True):
        head.leader = leader
    return heads


def _find_resumed_at(planned: PlannedPass, job: Job) -> int | None:
    """Tokens that the job has trained on; None for a new plain run. A new run of a multirun has 0:
    without earlier logs in its folder, loggers treat 0 like None."""
    return planned.steps_done * job.config.trainer.batch if job.resumed else None


def make_head(job: Job, sites: SitePair, llm: LLMShape, ranks: Ranks = ALONE) -> Head:
    """The head that trains a job's SAE, split over `ranks`; its log is set later."""
    config = job.config
    trained_tokens = config.trainer.steps * config.trainer.batch
    head = Head(
        build_sae(config.model, *map(llm.width_at, sites), ranks=ranks),
        name=job.label,
        folder=job.folder,
        source=sites.source,
        target=sites.target,
        loss=config.loss,
        optim=config.optim,
        callbacks=config.callbacks,
        dead_window=config.callbacks.compute_dead_window(trained_tokens),
        seed=config.model.seed,
        products=config.trainer.products,
    )
    head.tuned_from = config.tuned_from
    head.settings = config.list_fixed_settings()
    head.metadata = config.data_source.make_saelens_metadata(sites) | {
        "sae_lightning": config.describe_settings()
    }
    return head


def open_other_loggers(planned: PlannedPass, heads: Iterable[Head]) -> None:
    """Open the loggers beside TensorBoard, each for the run of one head."""
    notes: set[str] = set()  # shared by all heads, so that each note is printed once
    for index, head in zip(planned.own_share, heads, strict=True):
        job = planned.jobs[index]
        if not head.writes:
            continue
        sweep = job.sweep_folder or find_sweep_folder(job.folder)
        run = LoggedRun(
            job.folder,
            name=job.folder.name if sweep else name_with_day(job.folder),
            group=sweep and name_with_day(sweep),
            settings=job.config.describe_settings(),
            resumed_at=_find_resumed_at(planned, job),
        )
        head.log.extra_loggers = open_loggers(job.config.logger, run, notes)
