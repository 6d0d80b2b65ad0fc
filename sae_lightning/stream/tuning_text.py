"""Training text for `loss.kl`, which compares the LLM's predictions with and without an SAE.

    text           s0 s1 s2 s3 | s4 s5 s6 s7 | s8 ...     as training reads it, from its beginning
    update         first       | first + 1   | ...        first: the first update with KL

The numbers `first` and `update` determine which sequences are read: so no state is saved, resuming
is exact, and the training batches are not affected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lightning.llm.capture import capture
from sae_lightning.llm.load import LLM
from sae_lightning.llm.sites import Site
from sae_lightning.llm.spliced_kl import CleanRun, run_clean
from sae_lightning.llm.vocabulary import find_special_ids
from sae_lightning.stream.packing import Sequences, TokenStream
from sae_lightning.stream.rows import compute_medians, mark_usual_rows
from sae_lightning.terminal import phase


class TuningText:
    """Sequences of training text, never held out, and the LLM's predictions on them without SAEs.

    It also marks the tokens whose activations an SAE will replace. They are chosen as in training,
    but `max_norm` is relative to the median norm of each forward pass.
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
        """`token_stream`: the training text, which is read again from its beginning; `batch`:
        sequences per forward pass; `max_norm`: a multiple of the median norm at each of `sites`."""
        self.llm, self.token_stream, self.sites = llm, token_stream, sites
        self.batch, self.max_norm = batch, max_norm
        dropped_ids = [] if keep_special else find_special_ids(llm.tokenizer)
        self._dropped_ids = torch.tensor(dropped_ids, dtype=torch.int64)
        # first update with KL -> a stream, and the update whose sequences come next in this stream
        self._opened: dict[int, tuple[TokenStream, int]] = {}

    def run_update(self, first: int, update: int, token_count: int) -> list[CleanRun]:
        """Run the LLM on the sequences of update number `update`, about `token_count` tokens, for
        SAEs whose first update with KL has the number `first`."""
        window_size = self.token_stream.packing.window_size
        sequences = self._read(first, update, -(-token_count // window_size))
        keep = sequences.mark_kept(self._dropped_ids)
        parts = zip(sequences.tokens.split(self.batch), keep.split(self.batch), strict=True)
        model = self.llm.model
        return [run_clean(model, ids, self._drop_large_norms(ids, kept)) for ids, kept in parts]

    def _read(self, first: int, update: int, count: int) -> Sequences:
        """Read the `count` sequences of an update. The first call in a resumed run also reads the
        sequences of all earlier updates, and drops them."""
        stream, next_update = self._opened.get(first) or (self.token_stream.reopen(), first)
        if next_update < update:  # the run was resumed
            with phase("reading the text of loss.kl", total=update - next_update) as advance:
                for _ in range(next_update, update):
                    stream.next(count)
                    advance(1)
        self._opened[first] = stream, update + 1
        return stream.next(count)

    def _drop_large_norms(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """`keep` [sequences, context] without the tokens whose activations have a large norm."""
        if self.max_norm is None or not keep.any():
            return keep
        positions = keep.flatten().nonzero().squeeze(1)
        rows = capture(self.llm.model, tokens, self.sites, positions)
        is_usual = mark_usual_rows(rows, compute_medians(rows), self.max_norm).cpu()
        return keep.masked_scatter(keep, is_usual)  # takes `is_usual` where `keep` is true
