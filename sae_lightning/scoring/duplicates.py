"""Whether features are copies of one another, which explained variance does not tell.

Shapes: features = decoder rows, d_out = width of the target site.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

COPY_COSINE = 0.9  # cosine above which two decoder rows write the same
MAX_LIVE_FEATURES = 16_384  # compared with all others: bounds time, which grows with both
BLOCK_ROWS = 1024  # rows compared with as many others at a time: bounds memory


class Copies(NamedTuple):
    """How near live features (those that fire on held-out data) are to the next decoder row, be
    that of a live feature or not; NaN where no feature is live. Of more than 16,384 live features,
    as many stand for all, drawn with a fixed seed."""

    duplicates: float
    """Share of them whose nearest other row has a cosine above 0.9."""
    nearest_cosine: float
    """Median of that cosine."""


@torch.no_grad()
def measure_copies(W_dec: Tensor, density: Tensor) -> Copies:
    """Of decoder rows [features, d_out] and the share of tokens on which each fires [features]."""
    live = density.nonzero().squeeze(1)
    order = torch.randperm(len(live), generator=Generator().manual_seed(0))
    sample = live[order[:MAX_LIVE_FEATURES]]
    nearest = nearest_cosines(W_dec, sample.to(W_dec.device))
    return Copies((nearest > COPY_COSINE).float().mean().item(), nearest.median().item())


def nearest_cosines(W_dec: Tensor, which: Tensor) -> Tensor:
    """The largest cosine of each of the rows `which` [n] with any other row of W_dec
    [features, d_out]: [n], -1 where there is no other.

    Each pair is computed once: block i is compared with the blocks from i on, `which` before the
    others, and a pair of `which` counts for both.
    """
    others = torch.ones(len(W_dec), dtype=torch.bool, device=W_dec.device)
    others[which] = False
    order = torch.cat([which, others.nonzero().squeeze(1)])
    found = W_dec.new_full((len(which),), -1.0)
    for i in range(0, len(which), BLOCK_ROWS):
        rows = normalize(W_dec[order[i : min(i + BLOCK_ROWS, len(which))]])
        for j in range(i, len(order), BLOCK_ROWS):
            cosines = rows @ normalize(W_dec[order[j : j + BLOCK_ROWS]]).T
            if i == j:
                cosines.fill_diagonal_(-1)  # not its own neighbour
            for first, dim in ((i, 1), (j, 0)):
                known = found[first : first + BLOCK_ROWS]
                torch.maximum(known, cosines.amax(dim)[: len(known)], out=known)
    return found
