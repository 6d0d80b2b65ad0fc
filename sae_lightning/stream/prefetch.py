"""The LLM reads on while SAEs train.

LLM's stream      rows 3  rows 4 │ rows 5  rows 6 │ rows 7  ...
default stream    update on 1, 2 │  on 3, 4       │  on 5, 6
                                 └ waits for rows 4, not for rows 5
"""

from collections import deque
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from sae_lightning.stream.source import Rows, RowStream


class _Waiting(NamedTuple):
    """Rows that may still be computed, and where their source was before and after them."""

    rows: Rows
    before: dict[str, Any]
    epoch: int
    done: torch.cuda.Event | None


class PrefetchedRows:
    """A `RowStream` whose rows are those of `source`, begun before they are asked for.

    On a GPU they are computed on a CUDA stream of their own. On a CPU this changes nothing but the
    time at which they are computed. The state is that of the rows handed out: a resumed run
    computes again what was waiting. No more is read than the run wants.
    """

    def __init__(self, source: RowStream, rows: int) -> None:
        """`rows`: as many as an update needs are begun ahead."""
        self.source, self.rows = source, rows
        self.sites, self.device, self.most = source.sites, source.device, source.most
        self.epoch = source.epoch
        self._waiting: deque[_Waiting] = deque()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._stream is not None:  # the LLM was put there by the default stream
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @property
    def llm_seconds(self) -> float:
        return self.source.llm_seconds

    def next(self, wanted: int) -> Rows:
        """The rows of the next LLM batch; those of the following ones are begun."""
        left = wanted - sum(len(each.rows.ids) for each in self._waiting)
        if not self._waiting:
            left -= self._begin(left)
        rows, _, self.epoch, done = self._waiting.popleft()
        while left > 0 and sum(len(each.rows.ids) for each in self._waiting) < self.rows:
            left -= self._begin(left)
        if done is not None:
            # This batch only: waiting for the stream would be waiting for those begun after it.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for x in rows.activations.values():
                x.record_stream(current)  # its memory is not given to the LLM before it is read
        return rows

    def _begin(self, wanted: int) -> int:
        """Have the source compute an LLM batch; how many of the `wanted` rows it has."""
        before = self.source.state_dict()
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            rows = self.source.next(wanted)
            done = self._stream.record_event() if self._stream else None
        self._waiting.append(_Waiting(rows, before, self.source.epoch, done))
        return len(rows.ids)

    def state_dict(self) -> dict[str, Any]:
        """That of the source before the rows that wait."""
        return self._waiting[0].before if self._waiting else self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        self.source.load_state_dict(state)
        self.epoch = self.source.epoch

    def close(self) -> None:
        """No more rows are wanted; those that wait stay, as a state saved now comes before them."""
        self.source.close()
