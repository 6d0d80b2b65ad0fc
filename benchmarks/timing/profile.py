"""A look at some updates with torch.profiler."""

from typing import Any

import torch
from timing.shares import Kernel, Span, label_of, on_cpu, on_gpu, shares
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 5


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
