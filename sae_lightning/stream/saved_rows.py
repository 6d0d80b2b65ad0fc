"""Rows of saved activations, in a new order each epoch, and blocks that only evaluation reads.

Shapes: n = rows, d = width of a site.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lightning.llm.placement import move_to_device
from sae_lightning.llm.sites import Site
from sae_lightning.stream.activation_files import SavedMatrix
from sae_lightning.stream.documents import HOLD_OUT_SEED
from sae_lightning.stream.packing import report_epoch
from sae_lightning.stream.source import HeldOutData, Rows, RowStream
from sae_lightning.stream.states import TextChanged

SERVED_ROWS = 2048  # rows served at a time
ROWS_PER_BLOCK = 64  # neighbours in the files, which are read together
MIN_BLOCKS = 200  # blocks have fewer rows if there would be fewer blocks


class RowBlocks(NamedTuple):
    """Rows 0 to `row_count` - 1 in blocks of neighbours. Some blocks, a fixed random sample, are
    held out.

        rows     0 .. 63 | 64 .. 127 | 128 .. 191 | 192 .. 255 | ...
        block        0         1          2            3
                   train     train     held out      train

    Neighbours (tokens of a text, patches of an image) are similar: if single rows were held out,
    training would see rows very like them.
    """

    row_count: int
    size: int
    """Rows in a block; the last one may have fewer."""
    train: np.ndarray
    """Indices of the training blocks, ascending."""
    held_out: np.ndarray
    """Indices of the held-out blocks, ascending."""

    def count_rows(self, blocks: np.ndarray) -> np.ndarray:
        """Count the rows of each of the `blocks`, given by their indices."""
        return np.minimum(self.size, self.row_count - blocks * self.size)


def split_rows(n: int, share: float) -> RowBlocks:
    """Hold out about `share` of n rows, in blocks; the same rows for every seed of a run."""
    size = max(1, min(ROWS_PER_BLOCK, n // MIN_BLOCKS))
    block_count = -(-n // size)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(block_count)
    held_out_count = max(1, round(share * block_count))
    train, held_out = np.sort(order[held_out_count:]), np.sort(order[:held_out_count])
    return RowBlocks(n, size, train, held_out)


class SavedRows(RowStream):
    """A `RowStream` of the training rows, with the blocks in a new random order each epoch.

        blocks       0  1  3  4  5  7            those that are not held out
        epoch 1      4  0  7  3  1  5            order = PCG64(seed, 1)
        epoch 2      1  5  3  0  7  4            order = PCG64(seed, 2)
                             ^ position          state = number of rows served

    Each rank reads only the rows at its own sites.
    """

    def __init__(
        self,
        matrices: Mapping[Site, SavedMatrix],
        blocks: RowBlocks,
        *,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.matrices, self.blocks, self.seed = matrices, blocks, seed
        self.sites, self.device = tuple(sorted(matrices)), torch.device(device)
        self.max_rows, self.llm_seconds = SERVED_ROWS, 0.0
        self.rows_per_epoch = int(blocks.count_rows(blocks.train).sum())
        self._served = 0  # rows served so far
        self._fingerprints: dict[str, str] = {}  # by site; empty until they are needed
        self._begin_epoch(1)

    def _begin_epoch(self, epoch: int) -> None:
        """Draw the order of the blocks in `epoch` (from 1)."""
        self.epoch = epoch
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self._order = random.permutation(self.blocks.train)
        # the epoch's position at which each block begins and, last, the number of rows
        self._bounds = np.concatenate([[0], np.cumsum(self.blocks.count_rows(self._order))])

    def next(self, remaining: int) -> Rows:
        """Read the next rows, at most to the end of an epoch; each row counts as a sequence."""
        past_epochs, position = divmod(self._served, self.rows_per_epoch)
        if past_epochs == self.epoch:  # all rows of this epoch are served
            next_epoch = self.epoch + 1
            report_epoch(f"the activations ran out after {self.rows_per_epoch:,} rows", next_epoch)
            self._begin_epoch(next_epoch)
        stop = min(position + SERVED_ROWS, self.rows_per_epoch)
        ranges = self._find_ranges(position, stop)
        activations = {
            site: move_to_device(matrix.read_rows(ranges), self.device)
            for site, matrix in self.matrices.items()
        }
        sequence_ids = torch.arange(self._served, self._served + stop - position)
        self._served += stop - position
        return Rows(activations, sequence_ids)

    def _find_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Find the ranges (begin, end) of the files' rows that are at the positions `start` to
        `stop` - 1 of this epoch."""
        first, last = np.searchsorted(self._bounds, [start, stop - 1], side="right") - 1
        indices = self._order[first : last + 1]  # of the blocks that hold these rows
        begins = indices * self.blocks.size
        ends = begins + self.blocks.count_rows(indices)
        begins[0] += start - self._bounds[first]  # the rows may begin within the first block
        ends[-1] -= self._bounds[last + 1] - stop  # and end within the last one
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def summarise_files(self) -> dict[str, str]:
        """Describe the content of the files at each site, to recognise it after a resume."""
        self._fingerprints = self._fingerprints or {
            str(site): matrix.summarise_content() for site, matrix in self.matrices.items()
        }
        return self._fingerprints

    def state_dict(self) -> dict[str, Any]:
        """The number of rows served, and what `summarise_files` returns."""
        files = self.summarise_files()
        return {"served": self._served, "rows": self.rows_per_epoch, "files": files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last row served; TextChanged if the files have another content."""
        for site, current in self.summarise_files().items():
            saved = state["files"].get(site)
            if saved != current:
                raise TextChanged(
                    f"data.path: the activations at {site} are no longer those that the run to be "
                    f"resumed read ({current}, not {saved}); resume with the same files"
                )
        self._served = state["served"]
        # a state saved at the end of an epoch belongs to that epoch
        self._begin_epoch(1 + max(0, self._served - 1) // self.rows_per_epoch)


class HeldOutRows(HeldOutData):
    """Rows that training never sees; there is no LLM whose loss could be measured."""

    noun = "rows"

    def __init__(
        self,
        matrices: Mapping[Site, SavedMatrix],
        blocks: RowBlocks,
        *,
        tokens: int,
        device: torch.device | str,
    ) -> None:
        """Holds `tokens` rows, or all held-out rows if there are fewer, of blocks that are spread
        evenly over the files."""
        self.matrices, self.device = matrices, torch.device(device)
        held_out = blocks.held_out
        count = min(len(held_out), -(-tokens // blocks.size))
        indices = held_out[np.linspace(0, len(held_out) - 1, count).round().astype(np.int64)]
        begins = indices * blocks.size
        ends = begins + blocks.count_rows(indices)
        self._ranges = list(zip(begins.tolist(), ends.tolist(), strict=True))
        self._tokens = tokens
        self._activations: dict[Site, Tensor] = {}  # at the sites read so far

    def activations(self, site: Site) -> Tensor:
        if site not in self._activations:
            x = self.matrices[site].read_rows(self._ranges)[: self._tokens]
            self._activations[site] = x.to(self.device)
        return self._activations[site]
