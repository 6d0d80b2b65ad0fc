"""Rows of activations straight from the LLM.

tokens.next -> select -> capture -> drop norms above data.max_norm * median, at any of the sites
[n, context]     │       {site: [rows, d]}
                 │
                 ├─ not position 0 (BOS), whose activations are many times larger
                 ├─ not the padding of an epoch's last sequence
                 └─ not other special tokens, unless data.keep_special

Which tokens are selected depends on the text alone, so the CPU does not wait for the LLM. Norms are
known only after the LLM has run: with `data.max_norm` the CPU waits for each batch.
"""

import math
import zlib
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from sae_lightning.errors import UserError
from sae_lightning.llm.capture import capture, measure_branch_scale
from sae_lightning.llm.load import LLM
from sae_lightning.llm.placement import find_activation_device, move_to_device
from sae_lightning.llm.sites import Site
from sae_lightning.llm.vocabulary import find_special_ids
from sae_lightning.stream.packing import Sequences, TokenStream
from sae_lightning.stream.source import Rows, RowStream

MAX_EMPTY_BATCHES = 20  # consecutive LLM batches without a usable row before we give up


class SelectedTokens(NamedTuple):
    """The sequences of an LLM batch, and which of their tokens are trained on."""

    tokens: Tensor
    """[sequences, context]"""

    positions: Tensor
    """[rows] indices into the flattened tokens."""

    sequence_ids: Tensor
    """[rows] id of the sequence that each row comes from."""


class LLMRows(RowStream):
    """A `RowStream` that runs the LLM on `batch` sequences at a time, never on fewer.

    A smaller last batch would be cheaper, but rounding errors depend on the size of a batch, so
    rows would depend on where a run ends.
    """

    def __init__(
        self,
        llm: LLM,
        token_stream: TokenStream,
        sites: Sequence[Site],
        *,
        batch: int,
        max_norm: float | None = None,
        keep_special: bool = False,
    ) -> None:
        """`batch` is in sequences; activations stay on the LLM's device, in its dtype."""
        self.llm, self.token_stream, self.sites = llm, token_stream, tuple(sorted(set(sites)))
        self.batch, self.max_norm = batch, max_norm
        self._scaled_sites = [  # branches whose output the LLM scales before adding it (Granite)
            str(site) for site in self.sites if measure_branch_scale(llm.model, site) != 1
        ]
        self.device = find_activation_device(llm.model)
        self.max_rows = batch * token_stream.packing.window_size
        self.llm_batches = 0  # served so far
        self.tokens_crc32 = 0  # of the last LLM batch; shows a cache whether the text is the same
        self.llm_seconds = 0.0
        dropped_ids = [] if keep_special else find_special_ids(llm.tokenizer)
        self._dropped_ids = torch.tensor(dropped_ids, dtype=torch.int64)
        self._medians: dict[Site, float] | None = None  # median norms; None until there are rows
        self._empty_batches = 0  # consecutive LLM batches without rows

    @property
    def epoch(self) -> int:
        return self.token_stream.epoch

    def next(self, remaining: int) -> Rows:
        """Run a whole LLM batch, whatever `remaining` is; its rows are on the LLM's device."""
        selected = self.select_tokens()
        rows, sequence_ids = self.run_llm(selected), selected.sequence_ids
        if self.max_norm is not None and len(sequence_ids):
            # the medians of the first LLM batch with rows serve the whole run
            self._medians = self._medians or compute_medians(rows)
            indices = self.find_usual_indices(rows)
            rows, sequence_ids = keep_rows(rows, indices), sequence_ids[indices]
        self.check_not_empty(len(sequence_ids))
        return Rows(rows, sequence_ids)

    def select_tokens(self) -> SelectedTokens:
        """Read the sequences of the next LLM batch and select tokens, without running the LLM."""
        with record_function("pool"):  # in profiles, work on rows outside the LLM counts as "pool"
            sequences = self.read_sequences()
            keep = sequences.mark_kept(self._dropped_ids)  # [n, context]
            positions = keep.flatten().nonzero().squeeze(1)
            sequence_ids = sequences.sequence_ids.repeat_interleave(keep.sum(1))
        return SelectedTokens(sequences.tokens, positions, sequence_ids)

    def run_llm(self, selected: SelectedTokens) -> dict[Site, Tensor]:
        """Run the LLM -> activations {site: [rows, d]} of the selected tokens, on its device."""
        with record_function("pool"):
            tokens = move_to_device(selected.tokens, self.device)
            positions = move_to_device(selected.positions, self.device)
        started = perf_counter()
        rows = capture(self.llm.model, tokens, self.sites, positions)
        self.llm_seconds += perf_counter() - started
        return rows

    def find_usual_indices(self, rows: dict[Site, Tensor]) -> Tensor:
        """Indices, on the CPU, of the rows that `mark_usual_rows` marks."""
        with record_function("pool"):
            is_usual = mark_usual_rows(rows, self._medians, self.max_norm)
            return is_usual.cpu().nonzero().squeeze(1)

    def read_sequences(self) -> Sequences:
        """Read the sequences of the next LLM batch, without running the LLM."""
        sequences = self.token_stream.next(self.batch)
        self.tokens_crc32 = zlib.crc32(sequences.tokens.numpy())
        self.llm_batches += 1
        return sequences

    def check_not_empty(self, row_count: int) -> None:
        """Note an LLM batch's number of rows; UserError after too many batches without rows."""
        self._empty_batches = 0 if row_count else self._empty_batches + 1
        if self._empty_batches == MAX_EMPTY_BATCHES:
            failure = (
                f"no activation of the last {MAX_EMPTY_BATCHES} LLM batches was left after dropping"
            )
            if self.max_norm is None:
                raise UserError(
                    f"data.keep_special=false: {failure} special tokens (with data.assistant_only, "
                    "all but the assistant's); look at the text, or keep them with "
                    "data.keep_special=true"
                )
            raise UserError(
                f"data.max_norm={self.max_norm}: {failure} special tokens and large norms; raise "
                "it, or look at the text"
            )

    def state_dict(self) -> dict[str, Any]:
        """`llm_batches`: LLM batches served; `read`: how many of them the token stream has read
        (all here, fewer with a cache); `tokens`: the state of the token stream; median norms."""
        medians = self._medians and {str(site): median for site, median in self._medians.items()}
        return {
            "llm_batches": self.llm_batches,
            "read": self.llm_batches,
            "tokens": self.token_stream.state_dict(),
            "medians": medians,
        } | ({"scaled": self._scaled_sites} if self._scaled_sites else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `llm_batches` LLM batches. A cache may have served the last ones without
        reading their text: that text is read here and dropped.

        UserError: an earlier version, which did not apply a branch's scale, saved the state.
        """
        if self._scaled_sites != state.get("scaled", []):
            raise UserError(
                f"resume: at {' and '.join(self._scaled_sites)} an earlier version of "
                "sae_lightning read activations before the LLM scales them; resume with that "
                "version, or start a new run"
            )
        self.token_stream.load_state_dict(state["tokens"])
        self.llm_batches = state["read"]
        while self.llm_batches < state["llm_batches"]:
            self.read_sequences()
        medians = state["medians"]
        self._medians = medians and {site: medians[str(site)] for site in self.sites}


def compute_medians(rows: dict[Site, Tensor]) -> dict[Site, float]:
    """Compute the median norm of rows {site: [n, d]}. UserError if one is not finite."""
    medians = {site: compute_norms(x).median().item() for site, x in rows.items()}
    for site, median in medians.items():
        if not math.isfinite(median):
            raise UserError(
                f"llm.dtype: activations of the LLM at {site} are not finite; give "
                "llm.dtype=float32, or use another LLM if it already is float32"
            )
    return medians


def mark_usual_rows(
    rows: dict[Site, Tensor], medians: dict[Site, float], max_norm: float
) -> Tensor:
    """Mark the rows of {site: [n, d]} with norm <= max_norm * median at every site -> [n] bool.

    A row that is too large at one site is dropped at all of them, so that rows stay aligned.
    """
    is_usual = [compute_norms(x) <= max_norm * medians[site] for site, x in rows.items()]
    return torch.stack(is_usual).all(dim=0)


def keep_rows(rows: dict[Site, Tensor], indices: Tensor) -> dict[Site, Tensor]:
    """The rows of {site: [n, d]} at `indices`, which are on the CPU."""
    by_device = {x.device: move_to_device(indices, x.device) for x in rows.values()}
    return {site: x.index_select(0, by_device[x.device]) for site, x in rows.items()}


def compute_norms(x: Tensor) -> Tensor:
    """Compute the norms of the rows of x [n, d] -> [n] float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
