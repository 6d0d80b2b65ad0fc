"""Which part of an update takes which share of the time, from what a profiler recorded.

Labels nest, and a moment belongs to one part only: the innermost label, but all that happens within
`backward` is the backward pass (gradients of the encode too).

    label     pool ─────────────────╮     backward ───────────────╮
              llm      ────────╮    │              encode ────╮   │
    part      pool   │ LLM     │pool│ rest │ backward              │ rest

On a GPU the time is that of the kernels, and a kernel belongs to the label within which it was
launched. Units: seconds.
"""

from collections.abc import Iterable
from typing import NamedTuple

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
