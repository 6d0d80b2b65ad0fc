"""Measures what each rank of a run sends and holds while it trains."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import psutil
import torch
from command import make_jobs
from timing import child
from timing.ours import Clock

import sae_lightning.runs.run as wiring
from sae_lightning.runs import devices, passes
from sae_lightning.training.callbacks import make_callbacks


def measure(runs: list[list[str]], folder: str) -> list[dict[str, Any]]:
    """Train the SAEs of `runs` on one pass; returns what each rank measured, by rank."""
    jobs, out = make_jobs(runs, Path(folder)), Path(folder)
    size = devices.count_ranks(jobs[0].config)
    settings = json.dumps({"folder": folder})
    # the command by which rank 0 starts the others, with `follow` of this file
    script = [str(child.HERE), "timing.ranks:follow", settings, os.devnull]
    devices.followers.command = [sys.executable, "-W", "ignore", *script]
    with _write_ledger(out / "rank-0.json"):
        passes.train_jobs(jobs)
    devices.followers.end()
    return [json.loads((out / f"rank-{r}.json").read_text("utf8")) for r in range(size)]


def follow(folder: str) -> None:
    """Train as a rank other than 0."""
    with _write_ledger(Path(folder, f"rank-{os.environ['RANK']}.json")):
        devices.follow()


@contextmanager
def _write_ledger(file: Path) -> Iterator[None]:
    """Write what this rank measures to `file`, if a pass is trained within the `with`."""
    ledger = Ledger(file)
    with patch.object(wiring, "make_callbacks", lambda *a: [ledger, *make_callbacks(*a)]):
        yield


class Ledger(Clock):
    """Bytes that this rank sends up to the last update, and memory that it holds there."""

    def __init__(self, file: Path):
        self.file = file

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        self.before = count_sent_bytes()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        super().on_train_batch_end(trainer, module)
        if trainer.global_step < module.steps:
            return
        (optimizer,) = trainer.optimizers
        moments = [x for state in optimizer.state.values() for x in state.values()]
        step = module.heads[0].last_step
        sent = count_sent_bytes()
        measured = {
            "tokens_per_second": module.tokens_seen / self.seconds,
            "sent": None if sent is None else (sent - self.before) / module.steps,
            "rows": sum(x.nbytes for x in module.last_batch.values()),
            "reconstruction": step.reconstruction.numel() * torch.float32.itemsize,
            "held": sum(x.nbytes for x in [*module.parameters(), *moments]),
            "peak_memory_gb": self.peak_memory_gb,
        }
        self.file.write_text(json.dumps(measured), "utf8")


def count_sent_bytes() -> int | None:
    """Bytes that this process has written so far, which gloo does to sockets; None where they
    cannot be counted (NCCL; macOS)."""
    process = psutil.Process()
    if torch.cuda.is_initialized() or not hasattr(process, "io_counters"):
        return None
    return process.io_counters().write_chars
