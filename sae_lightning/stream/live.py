"""Activations straight from the LLM, as training asks for them.

tokens.next -> capture -> drop -> pool -> batches
[n, context]   {site: [n, context, d]}    {site: [batch, d]}
                          │
                          ├─ position 0 (BOS), whose activations are many times larger
                          ├─ the padding of an epoch's last sequence
                          ├─ other special tokens, unless data.keep_special
                          └─ norms above data.max_norm x median, at any of the sites
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLM, special_ids
from sae_lightning.llm.sites import Site
from sae_lightning.stream.norms import medians, not_large
from sae_lightning.stream.packing import TokenSource
from sae_lightning.stream.shuffle import Pool
from sae_lightning.terminal import phase

EMPTY_BATCHES = 20  # LLM batches in a row without a usable row before we give up


class LiveStream:
    """An `ActivationStream` that runs the LLM only as far as the run needs.

    Before a batch is drawn the pool is filled to `pool` rows, by whole LLM batches, so it may hold
    up to one LLM batch more. Once the rows that remain to be served are in it, the LLM is not run
    again and the pool drains.

    rows in pool  ──────────────────────╮        pool
                 /                      ╰──╮
                /                          ╰──╮  0
               fill        steady            drain
    """

    def __init__(
        self,
        llm: LLM,
        tokens: TokenSource,
        sites: Sequence[Site],
        *,
        batch: int,
        total_batches: int,
        pool: int,
        llm_batch: int,
        max_norm: float | None = None,
        keep_special: bool = False,
        seed: int = 0,
    ) -> None:
        """`batch` and `pool` in tokens, `llm_batch` in sequences; activations stay on the LLM's
        device, in its dtype."""
        assert batch <= pool, f"batches of {batch} rows from a pool of {pool}"
        self.llm, self.tokens, self.sites = llm, tokens, tuple(sorted(set(sites)))
        self.batch, self.total_batches, self.pool_rows = batch, total_batches, pool
        self.llm_batch, self.max_norm = llm_batch, max_norm
        self.device = next(llm.model.parameters()).device
        dropped = [] if keep_special else special_ids(llm.tokenizer)
        self._dropped = torch.tensor(dropped, dtype=torch.int64)
        slack = llm_batch * tokens.packing.width
        self._pool = Pool(self.sites, pool + slack, seed=seed, device=self.device)
        self._served = 0  # batches
        self._medians: list[float] | None = None  # of the norms, one a site
        self._started = False
        self._seconds = {"all": 0.0, "llm": 0.0}
        self._distinct_sequences = 0

    def __len__(self) -> int:
        return self.total_batches

    def __iter__(self) -> Iterator[dict[Site, Tensor]]:
        while self._served < self.total_batches:
            with self._clock("all"):
                self._fill()
                taken = self._pool.take(self.batch)
            self._distinct_sequences = len(taken.ids.unique())
            self._served += 1  # before the yield: a state saved now continues after this batch
            yield taken.activations

    def peek(self, n: int) -> dict[Site, Tensor]:
        """Activations {site: [<= n, d]} that wait in the pool, spread over all of it."""
        with self._clock("all"):
            self._fill()
            return self._pool.peek(n).activations

    @property
    def seconds(self) -> float:
        return self._seconds["all"]

    @property
    def llm_seconds(self) -> float:
        return self._seconds["llm"]

    @property
    def distinct_sequences(self) -> int:
        return self._distinct_sequences

    @property
    def epoch(self) -> int:
        return self.tokens.epoch

    def _missing(self) -> int:
        """Rows that the rest of the run needs beyond those in the pool."""
        return (self.total_batches - self._served) * self.batch - len(self._pool)

    def _fill(self) -> None:
        """Run the LLM until the pool is full or holds all that the run still needs."""
        bar = nullcontext(lambda n: None)
        if not self._started:
            goal = min(self.pool_rows - len(self._pool), self._missing())
            bar = phase("filling the shuffle pool", total=goal) if goal > 0 else bar
            self._started = True
        empty = 0
        with bar as advance:
            while len(self._pool) < self.pool_rows and self._missing() > 0:
                added = self._add_llm_batch()
                advance(added)
                empty = 0 if added else empty + 1
                if empty == EMPTY_BATCHES:
                    raise UserError(
                        f"data.max_norm={self.max_norm}, data.keep_special: no activation of the "
                        f"last {empty} LLM batches was left after dropping special tokens and "
                        "large norms; raise data.max_norm, or look at the text and llm.dtype"
                    )

    def _add_llm_batch(self) -> int:
        """Capture one LLM batch, no larger than the run still needs; the rows it added."""
        n = min(self.llm_batch, -(-self._missing() // self.tokens.packing.width))
        sequences = self.tokens.next(n)
        with self._clock("llm"):
            captured = capture(self.llm.model, sequences.tokens.to(self.device), self.sites)
        keep = sequences.text & ~torch.isin(sequences.tokens, self._dropped)  # [n, context]
        places = keep.flatten().nonzero().squeeze(1)  # [rows]
        there = places.to(self.device)
        rows = {site: captured[site].flatten(0, 1)[there] for site in self.sites}
        ids = sequences.ids.repeat_interleave(keep.sum(1))  # [rows]
        if self.max_norm is not None and len(ids):
            # The medians are those of the first LLM batch, for the whole run.
            self._medians = self._medians or medians(rows)
            usual = not_large(rows, self._medians, self.max_norm)  # [rows]
            rows, ids = {site: x[usual] for site, x in rows.items()}, ids[usual.cpu()]
        self._pool.add(rows, ids)
        return len(ids)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Add the block's time to `name`, what the device still had to do before it left out."""
        started = self._now()
        yield
        self._seconds[name] += self._now() - started

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Place in the run and in the text, pool, medians: plain numbers, lists, CPU tensors."""
        return {
            "served": self._served,
            "medians": self._medians,
            "tokens": self.tokens.state_dict(),
            "pool": self._pool.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the last one served when the state was saved."""
        self._served, self._medians = state["served"], state["medians"]
        self.tokens.load_state_dict(state["tokens"])
        self._pool.load_state_dict(state["pool"])
        self._started = True
