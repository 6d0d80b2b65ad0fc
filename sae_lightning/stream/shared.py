"""Rows of activations from an LLM that several ranks run in turn.

LLM batch   0    1    2  | 3    4    5  |          one endless sequence, however many ranks
computed    r 0  r 1  r 2| r 0  r 1  r 2|          3 ranks, in rounds
served      0    1    2    3    4    5  ...        to every rank, in the order of one device
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sae_lightning.llm.sites import Site
from sae_lightning.ranks import world
from sae_lightning.stream.exchange import exchange_rows
from sae_lightning.stream.rows import LLMRows, compute_medians, keep_rows
from sae_lightning.stream.source import Rows

NO_INDICES = torch.empty(0, dtype=torch.int64)


class _ComputedBatch(NamedTuple):
    """An LLM batch that is computed but not served yet."""

    rows: Rows
    state_before: dict[str, Any]
    epoch: int
    """The epoch after this batch."""
    tokens_crc32: int


class SharedRows(LLMRows):
    """`LLMRows` of several ranks: LLM batches are computed in turn, and each rank is served all.

    Every rank reads the text of all batches, but runs the LLM on its own batches only. Each rank
    receives the rows of the others, at the sites that it needs. The state is the same as on one
    device: rows that are computed but not served yet are computed again after a resume.
    """

    def __init__(self, *args: Any, own_sites: Sequence[Site], **options: Any) -> None:
        """`own_sites`: the sites whose rows this rank needs. `args`, `options`: for `LLMRows`."""
        super().__init__(*args, **options)
        self._sites_by_rank = world().gather_values(set(own_sites))
        self._waiting: deque[_ComputedBatch] = deque()
        self._epoch = super().epoch
        model = self.llm.model
        width = model.config.get_text_config().hidden_size
        self._no_rows = torch.empty(0, width, dtype=model.dtype, device=self.device)

    @property
    def epoch(self) -> int:
        return self._epoch

    def next(self, remaining: int) -> Rows:
        """Serve the rows of the next LLM batch, at this rank's sites only."""
        if not self._waiting:
            self._compute_round(remaining)
        batch = self._waiting.popleft()
        self.llm_batches += 1
        self.tokens_crc32, self._epoch = batch.tokens_crc32, batch.epoch
        self.check_not_empty(len(batch.rows.sequence_ids))
        return batch.rows

    def _compute_round(self, remaining: int) -> None:
        """Compute one LLM batch per rank, or fewer if the `remaining` rows need fewer."""
        ranks, served = world(), self.llm_batches
        selected, states_before, epochs, crc32s = [], [], [], []
        while len(selected) < ranks.size and (not selected or remaining > 0):
            states_before.append(super().state_dict())
            selected.append(self.select_tokens())
            epochs.append(self.token_stream.epoch)
            crc32s.append(self.tokens_crc32)
            remaining -= len(selected[-1].sequence_ids)
        self.llm_batches = served  # undo the count of `select_tokens`: `next` serves these batches
        own_rows = self.run_llm(selected[ranks.rank]) if ranks.rank < len(selected) else {}
        ids_by_batch = [batch.sequence_ids for batch in selected]
        if self.max_norm is not None and any(map(len, ids_by_batch)):
            if self._medians is None:  # the first LLM batch with rows determines them for the run
                first = next(rank for rank, ids in enumerate(ids_by_batch) if len(ids))
                own_medians = compute_medians(own_rows) if ranks.rank == first else None
                self._medians = ranks.gather_values(own_medians)[first]
                # the states of later batches in this round were taken before: add the medians
                medians = {str(site): median for site, median in self._medians.items()}
                for state in states_before[first + 1 :]:
                    state["medians"] = medians
            own_indices = self.find_usual_indices(own_rows) if own_rows else NO_INDICES
            own_rows = keep_rows(own_rows, own_indices)
            indices_by_rank = ranks.gather_values(own_indices)
            kept = zip(ids_by_batch, indices_by_rank, strict=False)  # fewer batches than ranks
            ids_by_batch = [ids[indices] for ids, indices in kept]
        counts = [len(ids) for ids in ids_by_batch]
        activations = exchange_rows(own_rows, counts, self._sites_by_rank, self._no_rows)
        rows = map(Rows, activations, ids_by_batch)
        batches = zip(rows, states_before, epochs, crc32s, strict=True)
        self._waiting.extend(_ComputedBatch(*batch) for batch in batches)

    def state_dict(self) -> dict[str, Any]:
        """The state before the first batch that is not served yet, as on one device."""
        return self._waiting[0].state_before if self._waiting else super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        super().load_state_dict(state)
        self._epoch = super().epoch
