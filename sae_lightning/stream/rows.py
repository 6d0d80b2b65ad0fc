"""Rows of activations straight from the LLM.

tokens.next -> capture -> drop
[n, context]   {site: [n, context, d]}
                          │
                          ├─ position 0 (BOS), whose activations are many times larger
                          ├─ the padding of an epoch's last sequence
                          ├─ other special tokens, unless data.keep_special
                          └─ norms above data.max_norm x median, at any of the sites
"""

import zlib
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLM, special_ids
from sae_lightning.llm.sites import Site
from sae_lightning.stream.base import Rows
from sae_lightning.stream.norms import medians, not_large
from sae_lightning.stream.packing import Sequences, TokenSource

EMPTY_BATCHES = 20  # LLM batches in a row without a usable row before we give up


class LLMRows:
    """A `RowSource` that runs the LLM on the next `batch` sequences, always as many.

    A smaller last batch would save a little of the LLM's time, but the same sequence can come out
    of a smaller batch with other rounding errors: rows would depend on where a run ends.
    """

    def __init__(
        self,
        llm: LLM,
        tokens: TokenSource,
        sites: Sequence[Site],
        *,
        batch: int,
        max_norm: float | None = None,
        keep_special: bool = False,
    ) -> None:
        """`batch` in sequences; activations stay on the LLM's device, in its dtype."""
        self.llm, self.tokens, self.sites = llm, tokens, tuple(sorted(set(sites)))
        self.batch, self.max_norm = batch, max_norm
        self.device = next(llm.model.parameters()).device
        self.most = batch * tokens.packing.width
        self.llm_batches = 0  # served so far
        self.text = 0  # crc32 of the tokens of the last one
        self.llm_seconds = 0.0
        dropped = [] if keep_special else special_ids(llm.tokenizer)
        self._dropped = torch.tensor(dropped, dtype=torch.int64)
        self._medians: dict[Site, float] | None = None  # of the norms
        self._empty = 0

    @property
    def epoch(self) -> int:
        return self.tokens.epoch

    def next(self, wanted: int) -> Rows:
        """Capture one LLM batch, whatever is `wanted`; rows on the LLM's device."""
        sequences = self.skip()
        started = self._now()
        captured = capture(self.llm.model, sequences.tokens.to(self.device), self.sites)
        self.llm_seconds += self._now() - started
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
        self._check_not_empty(len(ids))
        return Rows(rows, ids)

    def skip(self) -> Sequences:
        """Read the text of an LLM batch, and no more."""
        sequences = self.tokens.next(self.batch)
        self.text = zlib.crc32(sequences.tokens.numpy())
        self.llm_batches += 1
        return sequences

    def close(self) -> None:
        """Nothing is held."""

    def _check_not_empty(self, rows: int) -> None:
        self._empty = 0 if rows else self._empty + 1
        if self._empty == EMPTY_BATCHES:
            raise UserError(
                f"data.max_norm={self.max_norm}, data.keep_special: no activation of the "
                f"last {EMPTY_BATCHES} LLM batches was left after dropping special tokens and "
                "large norms; raise data.max_norm, or look at the text and llm.dtype"
            )

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """LLM batches served, the text's state after `read` of them (here: all), and medians."""
        known = self._medians and {str(site): median for site, median in self._medians.items()}
        return {
            "llm_batches": self.llm_batches,
            "read": self.llm_batches,
            "tokens": self.tokens.state_dict(),
            "medians": known,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after LLM batch `llm_batches`; the text between `read` and it is read over."""
        self.tokens.load_state_dict(state["tokens"])
        self.llm_batches = state["read"]
        while self.llm_batches < state["llm_batches"]:
            self.skip()
        known = state["medians"]
        self._medians = known and {site: known[str(site)] for site in self.sites}
