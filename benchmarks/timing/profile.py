"""Which part of an update takes which share of the time, as torch.profiler sees it.

Labels nest, and a moment belongs to one part only: the innermost label, but all that happens within
`backward` is the backward pass (gradients of the encode too).

    label     pool ─────────────────╮     backward ───────────────╮
              llm      ────────╮    │              encode ────╮   │
    part      pool   │ LLM     │pool│ rest │ backward              │ rest

On a GPU the time is that of the kernels, and a kernel belongs to the label within which it was
launched. Units: seconds.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 5
PARTS = {  # label -> what the table calls it
    "llm": "LLM",
    "pool": "pool",
    "encode": "encode",
    "decode": "decode",
    "loss": "loss",
    "backward": "backward",
    "clip": "clip",
    "optimiser": "optimiser",
}
OPTIMISER = "Optimizer.step#"  # torch's own label, followed by the class
REST = "rest"  # Lightning's loop, callbacks, statistics


class Span(NamedTuple):
    """A label that was open from `start` to `end`."""

    label: str
    thread: int
    start: float
    end: float


class Kernel(NamedTuple):
    """Something that a GPU did."""

    thread: int
    """That launched it."""
    launched: float
    seconds: float


def label_of(name: str) -> str | None:
    """The label that an event's name stands for; None for any other event."""
    name = "optimiser" if name.startswith(OPTIMISER) else name
    return name if name in PARTS else None


def on_cpu(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of each label without those of the labels inside it."""
    seconds = dict.fromkeys(PARTS, 0.0)
    stack: list[tuple[Span, str]] = []  # open spans, and whose time they count as
    for span in sorted(spans, key=lambda s: (s.thread, s.start, -s.end)):
        while stack and (stack[-1][0].thread != span.thread or stack[-1][0].end <= span.start):
            stack.pop()
        outer = stack[-1][1] if stack else None
        mine = "backward" if outer == "backward" else span.label
        seconds[mine] += span.end - span.start
        if outer:
            seconds[outer] -= span.end - span.start
        stack.append((span, mine))
    return seconds


def on_gpu(kernels: Iterable[Kernel], spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of the kernels launched within each label.

    Autograd launches from a thread of its own, which opens no label: then the label counts that
    any thread had open.
    """
    seconds, spans = dict.fromkeys(PARTS, 0.0), list(spans)
    for kernel in kernels:
        around = [s for s in spans if s.start <= kernel.launched <= s.end]
        around = [s for s in around if s.thread == kernel.thread] or around
        if around:
            labels = [s.label for s in sorted(around, key=lambda s: s.start)]
            seconds["backward" if "backward" in labels else labels[-1]] += kernel.seconds
    return seconds


def shares(seconds: dict[str, float], wall: float) -> dict[str, float]:
    """The share of each part, and of the rest; they add up to 1.

    Parts that run at the same time can take longer than the wall's time: then they are compared
    with their sum.
    """
    busy = sum(seconds.values())
    whole = max(wall, busy)
    return {PARTS[label]: s / whole for label, s in seconds.items()} | {REST: 1 - busy / whole}


def profiler() -> profile:
    """A profiler of the CPU and of the GPU if there is one, of all threads."""
    activities = [ProfilerActivity.CPU]
    threads = None
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        threads = _ExperimentalConfig(profile_all_threads=True)  # a stream may have one of its own
    return profile(activities=activities, experimental_config=threads, acc_events=True)


def summary(recorded: profile, wall: float) -> dict[str, Any]:
    """Shares of the parts in `wall` seconds, and the operations that took longest."""
    events = recorded.profiler.kineto_results.events()
    host = [e for e in events if e.device_type() == DeviceType.CPU]
    spans = [
        Span(label, e.start_thread_id(), e.start_ns() / 1e9, (e.start_ns() + e.duration_ns()) / 1e9)
        for e in host
        if (label := label_of(e.name()))
    ]
    kernels = _kernels(events, host)
    seconds = on_gpu(kernels, spans) if kernels else on_cpu(spans)
    return {
        "shares": shares(seconds, wall),
        "device": "gpu" if kernels else "cpu",
        "largest": _largest(recorded, bool(kernels), wall),
    }


def _kernels(events: list, host: list) -> list[Kernel]:
    """What ran on the GPU, each with the operation, or else the CUDA call, that launched it."""
    calls = {e.correlation_id(): e for e in host if e.name().startswith(("cuda", "cu"))}
    operations = {e.correlation_id(): e for e in host if not e.name().startswith(("cuda", "cu"))}
    kernels = []
    for e in events:
        if e.device_type() != DeviceType.CUDA or e.is_user_annotation():
            continue
        by = operations.get(e.linked_correlation_id()) or calls.get(e.correlation_id())
        if by:
            kernels.append(Kernel(by.start_thread_id(), by.start_ns() / 1e9, e.duration_ns() / 1e9))
    return kernels


def _largest(recorded: profile, gpu: bool, wall: float) -> dict[str, float]:
    """The operations (on a GPU: kernels) that took longest by themselves, as shares of the time."""
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [
        (getattr(e, field) / 1e6 / wall, e.key)
        for e in recorded.key_averages()
        if not label_of(e.key) and (not gpu or e.device_type == DeviceType.CUDA)
    ]
    return {name: share for share, name in sorted(rows, reverse=True)[:LARGEST]}
