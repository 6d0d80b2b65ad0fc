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


class _Computed(NamedTuple):
    """Rows of one LLM batch, the state before it, and the epoch and text checksum after it."""

    rows: Rows
    before: dict[str, Any]
    epoch: int
    crc32: int


class SharedRows(LLMRows):
    """`LLMRows` of several ranks: LLM batches are computed in turn, and each rank is served all.

    Every rank reads the text of all batches, but runs the LLM on its own batches only. The other
    ranks send it their rows, at the sites that it needs. The state is that of one device: rows that
    are computed but not served yet are computed again after a resume.
    """

    def __init__(self, *args: Any, own_sites: Sequence[Site], **options: Any) -> None:
        """`own_sites`: the sites whose rows this rank needs; the rest is as in `LLMRows`."""
        super().__init__(*args, **options)
        self._wanted = world().gather_values(set(own_sites))
        self._waiting: deque[_Computed] = deque()
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
        computed = self._waiting.popleft()
        self.llm_batches += 1
        self.tokens_crc32, self._epoch = computed.crc32, computed.epoch
        self.check_not_empty(len(computed.rows.sequence_ids))
        return computed.rows

    def _compute_round(self, remaining: int) -> None:
        """Compute one LLM batch per rank, fewer if the `remaining` rows need fewer."""
        ranks, served = world(), self.llm_batches
        before, chosen, ends = [], [], []
        while len(chosen) < ranks.size and (not chosen or remaining > 0):
            before.append(super().state_dict())
            chosen.append(self.select_tokens())
            ends.append((self.tokens.epoch, self.tokens_crc32))
            remaining -= len(chosen[-1].sequence_ids)
        self.llm_batches = served
        own_rows = self.run_llm(chosen[ranks.rank]) if ranks.rank < len(chosen) else {}
        ids = [selected.sequence_ids for selected in chosen]
        if self.max_norm is not None and any(map(len, ids)):
            if self._medians is None:  # of the first LLM batch with rows
                first = next(rank for rank, batch_ids in enumerate(ids) if len(batch_ids))
                computed = compute_medians(own_rows) if ranks.rank == first else None
                self._medians = ranks.gather_values(computed)[first]
                medians = {str(site): median for site, median in self._medians.items()}
                after = [state | {"medians": medians} for state in before[first + 1 :]]
                before = before[: first + 1] + after
            kept = self.find_usual(own_rows) if own_rows else torch.empty(0, dtype=torch.int64)
            own_rows = keep_rows(own_rows, kept)
            all_kept = ranks.gather_values(kept)
            ids = [batch_ids[kept] for batch_ids, kept in zip(ids, all_kept, strict=False)]
        rows = exchange_rows(
            own_rows, [len(batch_ids) for batch_ids in ids], self._wanted, self._no_rows
        )
        for part, batch_ids, state, end in zip(rows, ids, before, ends, strict=True):
            self._waiting.append(_Computed(Rows(part, batch_ids), state, *end))

    def state_dict(self) -> dict[str, Any]:
        """The state of one device before the first batch that is not served yet."""
        return self._waiting[0].before if self._waiting else super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        super().load_state_dict(state)
        self._epoch = super().epoch
