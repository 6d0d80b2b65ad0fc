"""Training text for the term of the loss that needs the LLM (`loss.kl`), with the LLM's own run.

    text           s0 s1 s2 s3 | s4 s5 s6 s7 | s8 ...     as training reads it, from its beginning
    update         first       | first + 1   | ...

Which sequences an update gets follows from its number and from that of the first such update: no
state is saved, resuming is exact, and the training batches are not affected.
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
from sae_lightning.stream.rows import compute_medians, find_usual_rows
from sae_lightning.terminal import phase


class TuningText:
    """Sequences of training text, never held out, on which the LLM runs without SAEs.

    SAEs replace the tokens that training keeps. Large norms are dropped by the median of the
    sequences at hand.
    """

    def __init__(
        self,
        llm: LLM,
        tokens: TokenStream,
        sites: Sequence[Site],
        *,
        batch: int,
        max_norm: float | None = None,
        keep_special: bool = False,
    ) -> None:
        """`tokens`: training's, which are opened anew; `batch`, in sequences, is that of a forward
        pass; `max_norm` is a multiple of the median norm at each of `sites`."""
        self.llm, self.tokens, self.sites = llm, tokens, sites
        self.batch, self.max_norm = batch, max_norm
        dropped = [] if keep_special else find_special_ids(llm.tokenizer)
        self._dropped = torch.tensor(dropped, dtype=torch.int64)
        # by first update: the stream, and the update whose sequences come next
        self._opened: dict[int, tuple[TokenStream, int]] = {}

    def run_update(self, first: int, update: int, tokens: int) -> list[CleanRun]:
        """Run the LLM on the sequences of an `update`, about `tokens` tokens, for SAEs whose first
        such update is `first`."""
        sequences = self._read(first, update, -(-tokens // self.tokens.packing.width))
        keep = sequences.mark_kept(self._dropped)
        parts = zip(sequences.tokens.split(self.batch), keep.split(self.batch), strict=True)
        return [run_clean(self.llm.model, ids, self._drop_long(ids, kept)) for ids, kept in parts]

    def _read(self, first: int, update: int, count: int) -> Sequences:
        stream, following = self._opened.get(first) or (self.tokens.reopen(), first)
        if following < update:  # the run was resumed
            with phase("reading the text of loss.kl", total=update - following) as advance:
                for _ in range(following, update):
                    stream.next(count)
                    advance(1)
        self._opened[first] = stream, update + 1
        return stream.next(count)

    def _drop_long(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """`keep` [sequences, context] without the tokens of large norm."""
        if self.max_norm is None or not keep.any():
            return keep
        places = keep.flatten().nonzero().squeeze(1)
        rows = capture(self.llm.model, tokens, self.sites, places)
        usual = find_usual_rows(rows, compute_medians(rows), self.max_norm).cpu()
        return keep.masked_scatter(keep, usual)
