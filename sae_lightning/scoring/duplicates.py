"""Copies: features with nearly the same decoder row. Explained variance does not reveal them.

Shapes: features = decoder rows, d_out = width of the target site.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sae_lightning.ranks import FeatureSplit

COPY_COSINE = 0.9  # above this cosine two decoder rows count as copies
MAX_FIRING_FEATURES = 16_384  # features that are compared with all rows: bounds time
BLOCK_ROWS = 1024  # rows compared with as many other rows at a time: bounds memory


class Copies(NamedTuple):
    """For each feature that fires on held-out data, the cosine of its decoder row with the nearest
    row of any other feature is measured. Both fields are NaN if no feature fires. If more than
    16,384 fire, a random sample of 16,384 is measured, drawn with a fixed seed."""

    duplicates: float
    """Share of the cosines above 0.9."""
    nearest_cosine: float
    """Median of the cosines."""


@torch.no_grad()
def measure_copies(W_dec: Tensor, density: Tensor, split: FeatureSplit | None = None) -> Copies:
    """Measure copies among decoder rows [features, d_out], given each feature's density: the share
    of tokens on which it fires [features]. With a `split`, W_dec has this rank's rows only."""
    firing = density.nonzero().squeeze(1)
    order = torch.randperm(len(firing), generator=Generator().manual_seed(0))
    sample = firing[order[:MAX_FIRING_FEATURES]]
    if split is None or split.ranks.size == 1:
        nearest = find_nearest_cosines(W_dec, sample.to(W_dec.device))
    else:
        nearest = find_nearest_on_ranks(W_dec, sample.to(W_dec.device), split)
    return Copies((nearest > COPY_COSINE).float().mean().item(), nearest.median().item())


def find_nearest_cosines(W_dec: Tensor, indices: Tensor) -> Tensor:
    """Find the largest cosine [n] of each row in `indices` [n] with any other row of W_dec
    [features, d_out]; -1 where there is no other row.

    The rows in `indices` are put before all other rows. A block of these is compared with itself
    and all later blocks, so each cosine is computed once, for both rows of a pair.
    """
    others = torch.ones(len(W_dec), dtype=torch.bool, device=W_dec.device)
    others[indices] = False
    order = torch.cat([indices, others.nonzero().squeeze(1)])
    nearest = W_dec.new_full((len(indices),), -1.0)
    for i in range(0, len(indices), BLOCK_ROWS):
        best = nearest[i : i + BLOCK_ROWS]
        rows = normalize(W_dec[indices[i : i + BLOCK_ROWS]])
        for j in range(i, len(order), BLOCK_ROWS):
            cosines = rows @ normalize(W_dec[order[j : j + BLOCK_ROWS]]).T
            if i == j:
                cosines.fill_diagonal_(-1)  # a row is not its own neighbour
            torch.maximum(best, cosines.amax(dim=1), out=best)
            other_best = nearest[j : j + BLOCK_ROWS]  # of the columns that are in `indices`
            torch.maximum(other_best, cosines.amax(dim=0)[: len(other_best)], out=other_best)
    return nearest


def find_nearest_on_ranks(W_dec: Tensor, indices: Tensor, split: FeatureSplit) -> Tensor:
    """`find_nearest_cosines` for a decoder that is split over ranks, each with its own rows W_dec
    [own features, d_out]. Every block of the rows in `indices` [n] is sent to all ranks, and each
    rank compares it with its own rows."""
    nearest = W_dec.new_full((len(indices),), -1.0)
    for block, best in zip(indices.split(BLOCK_ROWS), nearest.split(BLOCK_ROWS), strict=True):
        # feature i is row i // size of rank i % size
        is_own = block % split.ranks.size == split.ranks.rank
        row_in_W_dec = block // split.ranks.size
        rows = W_dec.new_zeros(len(block), W_dec.shape[1])
        rows[is_own] = W_dec[row_in_W_dec[is_own]]
        rows = normalize(split.ranks.sum(rows))  # every row is 0 on all ranks but one
        for start in range(0, len(W_dec), BLOCK_ROWS):
            others = W_dec[start : start + BLOCK_ROWS]
            cosines = rows @ normalize(others).T
            column = row_in_W_dec - start
            is_inside = is_own & (column >= 0) & (column < len(others))
            cosines[is_inside, column[is_inside]] = -1  # a row is not its own neighbour
            torch.maximum(best, cosines.amax(dim=1), out=best)
    return split.ranks.stack(nearest).amax(dim=0)
