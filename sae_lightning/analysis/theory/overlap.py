"""Whether decoder rows are nearly orthogonal: their cosines against those of random directions.

Shapes: d = width of the site; rows = decoder rows compared with all others.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

ROWS = 1024  # directions that are compared with all others
PART = 256  # of them at a time
BINS = 2000  # of a thousandth, from -1 to 1


class Cosines(NamedTuple):
    """Cosines of some directions with all the others."""

    counts: Tensor
    """[BINS] pairs by cosine, int64"""
    nearest: Tensor
    """[rows] the largest cosine of each"""

    def above(self, cosine: float) -> float:
        """Share of pairs whose |cosine| is above, to a thousandth."""
        middles = (torch.arange(BINS) + 0.5) * (2 / BINS) - 1
        return (self.counts[middles.abs() > cosine].sum() / self.counts.sum()).item()

    def size(self, share: float) -> float:
        """The |cosine| that this share of pairs does not exceed, to a thousandth."""
        half = BINS // 2
        folded = self.counts[half:] + self.counts[:half].flip(0)
        up_to = folded.cumsum(0) / folded.sum()
        return (int((up_to < share).sum()) + 1) / half

    def numbers(self) -> dict[str, float]:
        return {
            "median": self.size(0.5),
            "99%": self.size(0.99),
            "above_0.3": self.above(0.3),
            "nearest": self.nearest.mean().item(),
        }


def overlap(decoder: Tensor, data: Tensor) -> dict[str, Cosines]:
    """Cosines of decoder rows [features, d], of as many random directions, and of random directions
    with the covariance of the activations (what is long in the data is common to many).

    `data` [d, d] turns white noise (rows) into noise with that covariance.
    """
    generator = Generator().manual_seed(0)
    chosen = torch.randperm(len(decoder), generator=generator)[:ROWS]
    noise = torch.randn(decoder.shape, generator=generator)
    return {
        "decoder": cosines(decoder, chosen),
        "random": cosines(noise, chosen),
        "like_data": cosines(noise @ data.float(), chosen),
    }


def cosines(directions: Tensor, chosen: Tensor) -> Cosines:
    """Of the `chosen` [rows] among directions [n, d], each with all others."""
    directions = normalize(directions.float(), dim=1)
    counts, nearest = torch.zeros(BINS, dtype=torch.int64), []
    for part in chosen.split(PART):
        table = (directions[part] @ directions.T).clamp_(-1, 1)
        table[torch.arange(len(part)), part] = -2  # itself: below all bins
        counts += table.histc(BINS, -1, 1).long()
        nearest.append(table.amax(dim=1))
    return Cosines(counts, torch.cat(nearest))
