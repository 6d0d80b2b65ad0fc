"""How the time of an update is divided among its parts, as measured by torch.profiler.

Labels nest. Time counts for the part of the innermost label, except that everything within
`backward` counts as the backward pass (also the gradients of the encoder).

    label     pool ─────────────────╮     backward ───────────────╮
              llm      ────────╮    │              encode ────╮   │
    part      pool   │ LLM     │pool│ rest │ backward              │ rest

On a GPU the time is that of the kernels; a kernel counts for the label within which it was
launched. Units: seconds.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 5
PARTS = {  # label -> name in the table
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
    """Time from `start` to `end` within a label."""

    label: str
    thread: int
    start: float
    end: float


class Kernel(NamedTuple):
    """A kernel that ran on a GPU."""

    thread: int
    """CPU thread that launched it."""
    launched: float
    seconds: float


def read_label(name: str) -> str | None:
    """Label of an event by its name; None for other events."""
    name = "optimiser" if name.startswith(OPTIMISER) else name
    return name if name in PARTS else None


def sum_cpu_time(spans: Iterable[Span]) -> dict[str, float]:
    """Sum the seconds of each label, without those of labels inside it."""
    seconds = dict.fromkeys(PARTS, 0.0)
    stack: list[tuple[Span, str]] = []  # open spans, and whose time they count as
    for span in sorted(spans, key=lambda s: (s.thread, s.start, -s.end)):
        while stack and (stack[-1][0].thread != span.thread or stack[-1][0].end <= span.start):
            stack.pop()
        outer = stack[-1][1] if stack else None
        owner = "backward" if outer == "backward" else span.label
        seconds[owner] += span.end - span.start
        if outer:
            seconds[outer] -= span.end - span.start
        stack.append((span, owner))
    return seconds


def sum_gpu_time(kernels: Iterable[Kernel], spans: Iterable[Span]) -> dict[str, float]:
    """Sum the seconds of the kernels launched within each label.

    Autograd launches kernels from its own thread, which has no labels: these count for the label
    that is open in another thread.
    """
    seconds, spans = dict.fromkeys(PARTS, 0.0), list(spans)
    for kernel in kernels:
        around = [s for s in spans if s.start <= kernel.launched <= s.end]
        around = [s for s in around if s.thread == kernel.thread] or around
        if around:
            labels = [s.label for s in sorted(around, key=lambda s: s.start)]
            seconds["backward" if "backward" in labels else labels[-1]] += kernel.seconds
    return seconds


def compute_shares(seconds: dict[str, float], wall: float) -> dict[str, float]:
    """Compute the share of each part and of the rest; they add up to 1.

    Parts that overlap can add up to more than the wall time. The shares are then of their sum.
    """
    busy = sum(seconds.values())
    whole = max(wall, busy)
    return {PARTS[label]: s / whole for label, s in seconds.items()} | {REST: 1 - busy / whole}


def make_profiler() -> profile:
    """Make a profiler of all threads on the CPU, and of the GPU if there is one."""
    activities = [ProfilerActivity.CPU]
    threads = None
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        threads = _ExperimentalConfig(profile_all_threads=True)  # a stream may have one of its own
    return profile(activities=activities, experimental_config=threads, acc_events=True)


def summarize(recorded: profile, wall: float) -> dict[str, Any]:
    """Summarise a profile of `wall` seconds: shares of the parts, and the longest operations."""
    events = recorded.profiler.kineto_results.events()
    host = [e for e in events if e.device_type() == DeviceType.CPU]
    spans = [
        Span(label, e.start_thread_id(), e.start_ns() / 1e9, (e.start_ns() + e.duration_ns()) / 1e9)
        for e in host
        if (label := read_label(e.name()))
    ]
    kernels = _find_kernels(events, host)
    seconds = sum_gpu_time(kernels, spans) if kernels else sum_cpu_time(spans)
    return {
        "shares": compute_shares(seconds, wall),
        "device": "gpu" if kernels else "cpu",
        "largest": _find_largest(recorded, bool(kernels), wall),
    }


def _find_kernels(events: list, host: list) -> list[Kernel]:
    """Find the GPU kernels, each with the operation (or else the CUDA call) that launched it."""
    calls = {e.correlation_id(): e for e in host if e.name().startswith(("cuda", "cu"))}
    operations = {e.correlation_id(): e for e in host if not e.name().startswith(("cuda", "cu"))}
    kernels = []
    for e in events:
        if e.device_type() != DeviceType.CUDA or e.is_user_annotation():
            continue
        launch = operations.get(e.linked_correlation_id()) or calls.get(e.correlation_id())
        if launch:
            start = launch.start_ns() / 1e9
            kernels.append(Kernel(launch.start_thread_id(), start, e.duration_ns() / 1e9))
    return kernels


def _find_largest(recorded: profile, gpu: bool, wall: float) -> dict[str, float]:
    """Find the operations (on a GPU: kernels) that took longest -> their shares of the time."""
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [
        (getattr(e, field) / 1e6 / wall, e.key)
        for e in recorded.key_averages()
        if not read_label(e.key) and (not gpu or e.device_type == DeviceType.CUDA)
    ]
    return {name: share for share, name in sorted(rows, reverse=True)[:LARGEST]}
