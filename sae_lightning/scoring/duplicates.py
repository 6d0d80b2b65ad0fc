"""Copies: features with nearly the same decoder row. Explained variance does not reveal them.

Shapes: features = decoder rows, d_out = width of the target site.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sae_lightning.ranks import FeatureSplit

COPY_COSINE = 0.9  # above this cosine two decoder rows count as copies
MAX_LIVE_FEATURES = 16_384  # live features that are compared with all rows: bounds time
BLOCK_ROWS = 1024  # rows compared with as many other rows at a time: bounds memory


class Copies(NamedTuple):
    """Cosines of live features (those that fire on held-out data) with the nearest other decoder
    row, live or dead; NaN if no feature is live. If more than 16,384 are live, a random sample of
    16,384 is measured, drawn with a fixed seed."""

    duplicates: float
    """Share of live features whose nearest other row has a cosine above 0.9."""
    nearest_cosine: float
    """Median of that cosine."""


@torch.no_grad()
def measure_copies(W_dec: Tensor, density: Tensor, split: FeatureSplit | None = None) -> Copies:
    """Measure copies among decoder rows [features, d_out], given each feature's density: the share
    of tokens on which it fires [features]. With a `split`, W_dec has this rank's rows only."""
    live = density.nonzero().squeeze(1)
    order = torch.randperm(len(live), generator=Generator().manual_seed(0))
    sample = live[order[:MAX_LIVE_FEATURES]]
    if split is None or split.ranks.size == 1:
        nearest = find_nearest_cosines(W_dec, sample.to(W_dec.device))
    else:
        nearest = find_nearest_on_ranks(W_dec, sample.to(W_dec.device), split)
    return Copies((nearest > COPY_COSINE).float().mean().item(), nearest.median().item())


def find_nearest_cosines(W_dec: Tensor, indices: Tensor) -> Tensor:
    """Find the largest cosine [n] of each row in `indices` [n] with any other row of W_dec
    [features, d_out]; -1 where there is no other row.

    Rows in `indices` come first, and each block of them is compared with itself and all later
    blocks: each pair is computed once, and counts for both rows if both are in `indices`.
    """
    others = torch.ones(len(W_dec), dtype=torch.bool, device=W_dec.device)
    others[indices] = False
    order = torch.cat([indices, others.nonzero().squeeze(1)])
    nearest = W_dec.new_full((len(indices),), -1.0)
    for i in range(0, len(indices), BLOCK_ROWS):
        rows = normalize(W_dec[order[i : min(i + BLOCK_ROWS, len(indices))]])
        for j in range(i, len(order), BLOCK_ROWS):
            cosines = rows @ normalize(W_dec[order[j : j + BLOCK_ROWS]]).T
            if i == j:
                cosines.fill_diagonal_(-1)  # a row is not its own neighbour
            # the maxima of this block's rows, then of its columns that are in `indices`
            for first, dim in ((i, 1), (j, 0)):
                block = nearest[first : first + BLOCK_ROWS]
                torch.maximum(block, cosines.amax(dim)[: len(block)], out=block)
    return nearest


def find_nearest_on_ranks(W_dec: Tensor, indices: Tensor, split: FeatureSplit) -> Tensor:
    """`find_nearest_cosines` for a decoder that is split over ranks, each with its own rows W_dec
    [own features, d_out]: every block of the rows in `indices` [n] is sent to all ranks, which
    compare it with their own rows."""
    nearest = W_dec.new_full((len(indices),), -1.0)
    for block, best in zip(indices.split(BLOCK_ROWS), nearest.split(BLOCK_ROWS), strict=True):
        # feature i is row i // size on rank i % size; `held`: entries of the block on this rank
        own_rows = block // split.ranks.size
        (held,) = (block % split.ranks.size == split.ranks.rank).nonzero(as_tuple=True)
        rows = W_dec.new_zeros(len(block), W_dec.shape[1])
        rows[held] = W_dec[own_rows[held]]
        rows = normalize(split.ranks.sum(rows))
        for start in range(0, len(W_dec), BLOCK_ROWS):
            others = W_dec[start : start + BLOCK_ROWS]
            cosines = rows @ normalize(others).T
            inside = held[(own_rows[held] >= start) & (own_rows[held] < start + len(others))]
            cosines[inside, own_rows[inside] - start] = -1  # a row is not its own neighbour
            torch.maximum(best, cosines.amax(dim=1), out=best)
    return split.ranks.stack(nearest).amax(dim=0)
