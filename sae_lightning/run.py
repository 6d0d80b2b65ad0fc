"""Trains a list of jobs that share one stream: the only place where everything is wired."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch

from sae_lightning import checks, scorecard
from sae_lightning.config import CONFIG_FILE, Config, Job, resolved_yaml
from sae_lightning.export import atomically, write_json
from sae_lightning.llm.load import LLM, has_bf16, load
from sae_lightning.llm.sites import Site
from sae_lightning.sae import build
from sae_lightning.stream.documents import Text, open_text
from sae_lightning.stream.held_out import HeldOut
from sae_lightning.stream.live import LiveStream
from sae_lightning.stream.tokens import open_tokens
from sae_lightning.terminal import console, grid
from sae_lightning.training.callbacks import standard
from sae_lightning.training.callbacks.checkpoint import Checkpoint, export
from sae_lightning.training.callbacks.evaluate import evaluate
from sae_lightning.training.datamodule import ActivationData
from sae_lightning.training.head import Head
from sae_lightning.training.logging import HeadLog
from sae_lightning.training.module import SAEModule
from sae_lightning.training.settings import Accelerator, Precision, TrainerConfig

METRICS_FILE = "metrics.json"
# Shown in TensorBoard's HParams tab; a column for every setting would bury these.
HPARAMS = ("model.", "loss.", "layer.", "optim.lr", "llm.name", "trainer.tokens", "trainer.batch")


class Parts(NamedTuple):
    """What a run is made of."""

    data: ActivationData
    module: SAEModule
    checkpoint: Checkpoint
    trainer: L.Trainer


def run(jobs: list[Job]) -> list[dict[str, float]]:
    """Train the SAEs of `jobs`, which share the stream half of their configs, on one pass.

    Returns the final held-out metrics of each; its run folder holds the rest. UserError: anything
    wrong that can be known is told before the LLM is loaded.
    """
    finished = [checks.finished(job.folder / METRICS_FILE) for job in jobs]
    if all(finished):
        console.print(f"{jobs[0].folder} is finished; start a new run to train further")
        return [metrics["held_out"] for metrics in finished]
    sites, steps_done = checks.check(jobs)
    text = open_text(jobs[0].config.data)
    for job in jobs:
        with atomically(job.folder / CONFIG_FILE) as temporary:
            temporary.write_text(resolved_yaml(job), encoding="utf8")
    llm = load(jobs[0].config.llm)
    with _quiet_lightning():
        parts = assemble(jobs, sites, llm, text, steps_done)
        announce(jobs[0], parts, llm, steps_done)
        started = time.monotonic()
        parts.trainer.fit(
            parts.module,
            datamodule=parts.data,
            ckpt_path=parts.checkpoint.path if steps_done else None,
            weights_only=True,
        )
    if parts.checkpoint.stopped_by and parts.module.global_step < parts.module.steps:
        _say_how_to_continue(jobs[0], parts)
    seconds = time.monotonic() - started
    return finish(jobs, parts, (parts.module.steps - steps_done) * parts.module.batch / seconds)


def assemble(jobs: list[Job], sites: list[Site], llm: LLM, text: Text, steps_done: int) -> Parts:
    """Build stream, heads and trainer from the jobs' configs."""
    config = jobs[0].config
    trainer = config.trainer
    tokens = open_tokens(text, llm.tokenizer, context=config.data.context, seed=config.seed)
    stream = LiveStream(
        llm,
        tokens.train,
        sites,
        batch=trainer.batch,
        total_batches=trainer.steps,
        pool=config.data.pool,
        llm_batch=config.llm.batch,
        max_norm=config.data.max_norm,
        keep_special=config.data.keep_special,
        seed=config.seed,
    )
    held_out = HeldOut(
        llm,
        tokens.held_out,
        sites,
        tokens=config.eval.tokens,
        loss_tokens=config.eval.loss_tokens,
        batch=config.llm.batch,
        keep_special=config.data.keep_special,
    )
    resumed_at = steps_done * trainer.batch if steps_done else None
    width = llm.model.config.get_text_config().hidden_size
    heads = [
        _head(job, site, width, HeadLog(job.folder, _hparams(job.config), resumed_at))
        for job, site in zip(jobs, sites, strict=True)
    ]
    checkpoint = Checkpoint(
        checks.checkpoint_path(jobs[0].folder), trainer.checkpoint_every, config.identity()
    )
    return Parts(
        data=ActivationData(stream, held_out),
        module=SAEModule(heads, batch=trainer.batch, steps=trainer.steps),
        checkpoint=checkpoint,
        trainer=L.Trainer(
            accelerator=trainer.accelerator.value,
            devices=1,
            precision=_precision(trainer),
            max_epochs=1,
            min_epochs=0,
            max_steps=trainer.steps,
            callbacks=standard(trainer, config.eval, checkpoint),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=jobs[0].folder,
        ),
    )


def _precision(trainer: TrainerConfig) -> str:
    if trainer.precision is not Precision.auto:
        return trainer.precision.value
    found = torch.accelerator.current_accelerator()
    kind = "cpu" if trainer.accelerator is Accelerator.cpu or found is None else found.type
    return (Precision.bf16 if has_bf16(kind) else Precision.fp32).value


def _head(job: Job, site: Site, width: int, log: HeadLog) -> Head:
    config = job.config
    head = Head(
        build(config.model, width, width),
        name=job.name,
        folder=job.folder,
        source=site,
        target=site,
        loss=config.loss,
        optim=config.optim,
        recipe=config.callbacks,
        dead_window=config.callbacks.dead_window(config.trainer.tokens),
        seed=config.model.seed,
    )
    head.log = log
    head.metadata = {
        "model_name": config.llm.name,
        "hook_name": site.hook_name,
        "context_size": config.data.context,
        "prepend_bos": True,
        "sae_lightning": config.flat(),
    }
    return head


def finish(jobs: list[Job], parts: Parts, tokens_per_second: float) -> list[dict[str, float]]:
    """Score the trained SAEs, write `metrics.json` and `sae/`, and say where everything is."""
    module = parts.module
    for job, head in zip(jobs, module.heads, strict=True):
        evaluate(head, parts.data.held_out, module.tokens)
        head.log.close()
        export(head)
        metrics = {
            "finished": True,
            "tokens": module.tokens,
            "held_out": head.held_out_metrics,
            "density": head.density,
            "training": head.training_metrics,
            "speed": module.speed
            | {
                "tokens_per_second_in_all": tokens_per_second,
                "peak_memory_gb": checks.peak_memory_gb(),
            },
        }
        write_json(job.folder / METRICS_FILE, metrics)
        report(job, metrics)
    return [head.held_out_metrics for head in module.heads]


def announce(job: Job, parts: Parts, llm: LLM, steps_done: int) -> None:
    """Say what is about to be trained, and where the results go."""
    config, head = job.config, parts.module.heads[0]
    d = head.sae.W_enc.shape[0]
    parameters = sum(p.numel() for p in head.sae.parameters())
    dtype = str(next(llm.model.parameters()).dtype).removeprefix("torch.")
    rows = {
        "LLM": f"{llm.name}, {dtype} on {llm.model.device}",
        "site": f"{head.source} ({head.source.hook_name}), d = {d}",
        "SAE": f"{config.model.name}, {config.model.features:,} features, "
        f"{parameters / 1e6:.1f} M parameters",
        "training": f"{config.trainer.tokens:,} tokens in batches of {config.trainer.batch:,} "
        f"({config.trainer.steps:,} updates)",
        "results": str(shown(job.folder)),
    }
    if steps_done:
        rows["resuming"] = f"after {steps_done * config.trainer.batch:,} tokens"
    console.print(grid(rows))


def report(job: Job, metrics: dict) -> None:
    """The table at the end, and the commands that come next."""
    folder = shown(job.folder)
    lines = scorecard.rows(metrics["held_out"]) | {
        "dead in training": f"{metrics['training']['train/dead']:.1%} of features",
        "speed": _speed(metrics["speed"]),
        "peak memory": f"{metrics['speed']['peak_memory_gb']:.1f} GB",
    }
    console.print(grid(lines, title="on held-out text"))
    root = folder.parts[0] if not folder.is_absolute() else folder
    console.print(f"\n  tensorboard --logdir {root}\n  python analyze.py run={folder}\n")


def _speed(speed: dict[str, float]) -> str:
    """Empty shares: the last process had nothing left to train."""
    in_all = f"{speed['tokens_per_second_in_all']:,.0f} tokens/s with evaluation"
    if "llm_share" not in speed:
        return in_all
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s (LLM {speed['llm_share']:.0%} of the time, "
        f"SAE {speed['sae_share']:.0%}), {in_all}"
    )


def _say_how_to_continue(job: Job, parts: Parts) -> None:
    number = parts.checkpoint.stopped_by
    console.print(
        f"stopped by {number.name} and saved at {parts.module.tokens:,} tokens. Continue with\n\n"
        f"  python train.py resume={shown(job.folder)}\n"
    )
    sys.exit(128 + number)


def _hparams(config: Config) -> dict:
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in config.flat().items()
        if name.startswith(HPARAMS)
    }


def shown(folder: Path) -> Path:
    """`folder` as a person would type it: relative, if it is below the working folder."""
    folder = folder.absolute()
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence what Lightning says about itself; a user cannot act on any of it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
