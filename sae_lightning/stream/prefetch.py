"""Prefetching: the LLM computes the next rows while SAEs train.

LLM's stream      rows 3  rows 4 │ rows 5  rows 6 │ rows 7  ...
default stream    update on 1, 2 │  on 3, 4       │  on 5, 6
                                 └ waits for rows 4, not for rows 5
"""

from collections import deque
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from sae_lightning.stream.source import Rows, RowStream


class _PrefetchedBatch(NamedTuple):
    """The rows of an LLM batch, which the GPU may still be computing."""

    rows: Rows
    state_before: dict[str, Any]
    epoch: int
    """The epoch after these rows."""
    event: torch.cuda.Event | None
    """Occurs when the GPU has computed the rows; None on a CPU."""


class PrefetchedRows(RowStream):
    """A `RowStream` that starts to compute the rows of `inner` before they are needed.

    On a GPU they are computed on a separate CUDA stream; on a CPU they are just computed earlier.
    The state does not include prefetched rows: a resumed run computes them again. No more LLM
    batches are read than the run needs.
    """

    def __init__(self, inner: RowStream, ahead: int) -> None:
        """`ahead`: how many rows to prefetch; best as many as an update takes."""
        self.inner, self.ahead = inner, ahead
        self.sites, self.device, self.max_rows = inner.sites, inner.device, inner.max_rows
        self.epoch = inner.epoch
        self._waiting: deque[_PrefetchedBatch] = deque()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._stream is not None:  # the default stream copied the LLM to the GPU
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @property
    def llm_seconds(self) -> float:
        return self.inner.llm_seconds

    def next(self, remaining: int) -> Rows:
        """Return the rows of the next LLM batch, and start on the following ones."""
        needed = remaining - self._count_waiting()  # rows whose computation has to be begun
        if not self._waiting:
            needed -= self._begin(needed)
        rows, _, self.epoch, event = self._waiting.popleft()
        while needed > 0 and self._count_waiting() < self.ahead:
            needed -= self._begin(needed)
        if event is not None:
            # Wait for this batch only: the whole stream includes batches started after it.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for x in rows.activations.values():
                x.record_stream(current)  # or the LLM could reuse its memory before it is read
        return rows

    def _count_waiting(self) -> int:
        return sum(len(batch.rows.sequence_ids) for batch in self._waiting)

    def _begin(self, remaining: int) -> int:
        """Start computing the next LLM batch; returns its number of rows."""
        state_before = self.inner.state_dict()
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            rows = self.inner.next(remaining)
            event = self._stream.record_event() if self._stream else None
        self._waiting.append(_PrefetchedBatch(rows, state_before, self.inner.epoch, event))
        return len(rows.sequence_ids)

    def state_dict(self) -> dict[str, Any]:
        """The state of `inner` before the prefetched rows."""
        return self._waiting[0].state_before if self._waiting else self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        self.inner.load_state_dict(state)
        self.epoch = self.inner.epoch

    def close(self) -> None:
        """Close `inner`; prefetched rows are kept: `state_dict` needs the state before them."""
        self.inner.close()
