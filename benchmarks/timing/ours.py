"""Measurements of our own runs, from config to trained SAEs, and of how fast they could be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from command import make_jobs
from timing.clock import read_clock
from timing.profile import make_profiler, summarize

import sae_lightning.runs.run as wiring
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import has_bf16, load_llm, pick_device
from sae_lightning.llm.sites import find_decoder_stack
from sae_lightning.runs import passes
from sae_lightning.runs.config import Config
from sae_lightning.runs.folders import METRICS_FILE
from sae_lightning.runs.heap import keep_freed_memory
from sae_lightning.training.callbacks import make_callbacks
from sae_lightning.training.callbacks.throughput import measure_peak_memory_gb

UPDATES = 16  # number of updates to profile
SECONDS = 3.0  # total time of each measurement of the roofline


class _Done(Exception):
    """The profile is complete: the rest of the run is not needed."""


def measure(runs: list[list[str]], folder: str) -> dict[str, Any]:
    """Train the SAEs of `runs` (lists of overrides) on one pass; returns tokens/s, memory, and L0
    and EV of the first SAE."""
    jobs, clock = make_jobs(runs, Path(folder)), Clock()
    with patch.object(wiring, "make_callbacks", lambda *a: [clock, *make_callbacks(*a)]):
        passes.train_jobs(jobs)
    metrics = [json.loads((job.folder / METRICS_FILE).read_text("utf8")) for job in jobs]
    speed, tokens = metrics[0]["speed"], metrics[0]["tokens"]
    assert speed["heads"] == len(runs), "the SAEs did not train on one pass"
    return {
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "l0": metrics[0]["held_out"]["l0"],
        "explained_variance": metrics[0]["held_out"]["explained_variance"],
        "peak_memory_gb": clock.peak_memory_gb,
        "speed": speed,
    }


def profile_run(runs: list[list[str]], folder: str) -> dict[str, Any]:
    """Train like `measure` up to the middle of the run; returns a profile of updates there."""
    jobs = make_jobs(runs, Path(folder))
    profiling = _ProfileUpdates(*choose_window(jobs[0].config))
    with patch.object(wiring, "make_callbacks", lambda *a: [*make_callbacks(*a), profiling]):
        try:
            passes.train_jobs(jobs)
        except _Done:
            return profiling.summary
    raise AssertionError("the run ended before its middle")


def choose_window(config: Config) -> tuple[int, int]:
    """Choose updates to profile (after which, how many) in the middle of those in which the LLM
    runs. (At the end of a run, the pool drains and the LLM does not run.)"""
    steps = config.trainer.steps
    with_llm = steps - config.data.pool // config.trainer.batch
    if with_llm < 4:  # in a tiny run, the pool holds all rows from the beginning
        with_llm = steps
    return max(1, with_llm // 2), max(1, min(UPDATES, with_llm // 2 - 1))


def measure_roofline(run: list[str], folder: str) -> dict[str, Any]:
    """Measure the speed of one dense encoder product, and of the LLM up to the hooked block."""
    keep_freed_memory()  # as training does
    config = make_jobs([run], Path(folder))[0].config
    device = pick_device(config.llm)
    dtype = torch.bfloat16 if has_bf16(device.type) else torch.float32
    llm = load_llm(config.llm).model
    stack = find_decoder_stack(llm)
    site = config.layer.resolve_sites(len(stack)).source
    width, features = llm.config.get_text_config().hidden_size, config.model.features
    batch, sequences, context = config.trainer.batch, config.llm.batch, config.data.context
    x = torch.randn(batch, width, device=device, dtype=dtype)
    weights = torch.randn(width, features, device=device, dtype=dtype)
    ids = torch.randint(1000, 30_000, (sequences, context))
    encode_seconds = _measure_seconds(lambda: x @ weights)
    llm_seconds = _measure_seconds(lambda: capture(llm, ids, [site]))
    flops = 2 * batch * width * features / encode_seconds
    blocks = sum(p.numel() for block in stack[: site.layer + 1] for p in block.parameters())
    return {
        "number": str(dtype).removeprefix("torch."),
        "flops": flops,
        "encode_tokens_per_second": batch / encode_seconds,
        "llm_tokens_per_second": sequences * (context - 1) / llm_seconds,
        "llm_block_parameters": blocks,
    }


def _measure_seconds(work: Callable[[], Any]) -> float:
    """Time repeated calls; returns the seconds of the fastest, because the floor is a bound."""
    times, total = [], 0.0
    while total < SECONDS or len(times) < 8:
        started = read_clock()
        work()
        times.append(read_clock() - started)
        total += times[-1]
    return min(times)


class Clock(L.Callback):
    """Seconds from before the first fill of the pool to the last update."""

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.started = read_clock()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.global_step == module.steps:
            self.seconds = read_clock() - self.started
            self.peak_memory_gb = measure_peak_memory_gb()  # of training: evaluation comes later


class _ProfileUpdates(L.Callback):
    """Profiles whole updates: from the end of one to the end of another."""

    def __init__(self, after: int, updates: int):
        self.after, self.updates, self.profiler = after, updates, make_profiler()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.global_step == self.after:
            self.profiler.start()
            self.started = read_clock()
        if trainer.global_step == self.after + self.updates:
            wall = read_clock() - self.started
            self.profiler.stop()
            self.summary = summarize(self.profiler, wall) | {
                "updates": [self.after, self.after + self.updates],
                "tokens_per_second": self.updates * module.batch / wall,
            }
            raise _Done
