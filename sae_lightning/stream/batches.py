"""Shuffled batches, made as training asks for them.

rows.next -> pool -> batches
{site: [n, d]}       {site: [batch, d]}
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from sae_lightning.llm.sites import Site
from sae_lightning.stream.shuffle import Pool
from sae_lightning.stream.source import RowStream
from sae_lightning.terminal import phase


class BatchStream:
    """Shuffled batches {site: [batch, d]} of one run, with exact resume.

    Before a batch is drawn the pool is filled to `pool` rows, in whole LLM batches, so it may hold
    up to one LLM batch more. Once it holds all rows that the run still needs, no more are read and
    the pool drains.

    rows in pool  ──────────────────────╮        pool
                 /                      ╰──╮
                /                          ╰──╮  0
               fill        steady            drain
    """

    def __init__(
        self,
        rows: RowStream,
        *,
        batch: int,
        total_batches: int,
        pool: int,
        seed: int = 0,
        sites: Sequence[Site] | None = None,
    ) -> None:
        """`batch` and `pool` are in rows; the pool is on the device of `rows`; batches have the
        `sites` (None: all of `rows`)."""
        assert batch <= pool, f"batches of {batch} rows from a pool of {pool}"
        self.rows, self.batch, self.total_batches, self.pool_rows = rows, batch, total_batches, pool
        self.device = rows.device
        self.seconds = 0.0  # spent on making batches
        self._pool = Pool(sites or rows.sites, pool + rows.max_rows, seed=seed, device=rows.device)
        self._served = 0  # batches served so far
        self._started = False  # whether the pool has been filled, or a state loaded
        self._sequence_ids = torch.empty(0, dtype=torch.int64)  # ids of the last batch's rows

    def __len__(self) -> int:
        return self.total_batches

    def __iter__(self) -> Iterator[dict[Site, Tensor]]:
        while self._served < self.total_batches:
            with self._time():
                self._fill()
                with record_function("pool"):
                    rows = self._pool.take(self.batch)
            self._sequence_ids = rows.sequence_ids
            self._served += 1  # before the yield: states saved while it is trained on count it
            yield rows.activations

    def peek(self, n: int) -> dict[Site, Tensor]:
        """Copy activations {site: [<= n, d]} of rows spread evenly over the pool; removes none."""
        with self._time():
            self._fill()
            if self.device.type != "cpu":  # `seconds` includes the wait for the device
                torch.accelerator.synchronize(self.device)
            return self._pool.peek(n).activations

    @property
    def llm_seconds(self) -> float:
        return self.rows.llm_seconds

    @property
    def distinct_sequences(self) -> int:
        """Number of sequences that the rows of the last batch come from."""
        return len(self._sequence_ids.unique())

    @property
    def epoch(self) -> int:
        return self.rows.epoch

    def close(self) -> None:
        self.rows.close()

    def _count_missing(self) -> int:
        """Count the rows that the run still needs in addition to those in the pool."""
        return (self.total_batches - self._served) * self.batch - len(self._pool)

    def _fill(self) -> None:
        """Add rows until the pool is full or holds all that the run still needs."""
        progress = nullcontext(lambda row_count: None)  # shows nothing
        if not self._started:
            goal = min(self.pool_rows - len(self._pool), self._count_missing())
            if goal > 0:
                progress = phase("filling the shuffle pool", total=goal)
            self._started = True
        with progress as advance:
            while len(self._pool) < self.pool_rows and self._count_missing() > 0:
                rows = self.rows.next(self._count_missing())
                with record_function("pool"):
                    self._pool.add(rows.activations, rows.sequence_ids)
                advance(len(rows.sequence_ids))

    @contextmanager
    def _time(self) -> Iterator[None]:
        """Add the seconds that the block takes to `seconds`."""
        started = perf_counter()
        yield
        self.seconds += perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """Batches served, and the states of rows and pool: plain values and CPU tensors."""
        return {
            "served": self._served,
            "rows": self.rows.state_dict(),
            "pool": self._pool.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the last one served when the state was saved."""
        self._served = state["served"]
        self._pool.load_state_dict(state["pool"])
        self.rows.load_state_dict(state["rows"])
        self._started = True
