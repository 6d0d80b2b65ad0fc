"""Whether decoder rows are nearly orthogonal: cosines of decoder rows and of random directions.

Shapes: d = width of the site; rows = decoder rows compared with all others.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

COMPARED_ROWS = 1024  # directions that are compared with all others
ROWS_AT_ONCE = 256  # bounds memory
COSINE_BINS = 2000  # from -1 to 1, 0.001 wide


class Cosines(NamedTuple):
    """Cosines of some directions with all others."""

    counts: Tensor
    """[COSINE_BINS] int64: number of pairs by cosine"""
    nearest: Tensor
    """[rows] largest cosine of each row with another direction"""

    def find_share_above(self, cosine: float) -> float:
        """Share of pairs whose |cosine| is above `cosine`, which is rounded to 0.001."""
        middles = (torch.arange(COSINE_BINS) + 0.5) * (2 / COSINE_BINS) - 1
        return (self.counts[middles.abs() > cosine].sum() / self.counts.sum()).item()

    def find_quantile(self, share: float) -> float:
        """The |cosine| that this share of pairs does not exceed, rounded up to 0.001."""
        half = COSINE_BINS // 2
        folded = self.counts[half:] + self.counts[:half].flip(0)
        up_to = folded.cumsum(0) / folded.sum()
        return (int((up_to < share).sum()) + 1) / half

    def scalars(self) -> dict[str, float]:
        return {
            "median": self.find_quantile(0.5),
            "99%": self.find_quantile(0.99),
            "above_0.3": self.find_share_above(0.3),
            "nearest": self.nearest.mean().item(),
        }


def compare_directions(decoder: Tensor, data: Tensor) -> dict[str, Cosines]:
    """Cosines of decoder rows [features, d], of as many random directions, and of random directions
    drawn with the covariance of the activations.

    data: [d, d] matrix that gives rows of white noise that covariance (noise @ data).
    """
    generator = Generator().manual_seed(0)
    chosen = torch.randperm(len(decoder), generator=generator)[:COMPARED_ROWS]
    noise = torch.randn(decoder.shape, generator=generator)
    return {
        "decoder": count_cosines(decoder, chosen),
        "random": count_cosines(noise, chosen),
        "like_data": count_cosines(noise @ data.float(), chosen),
    }


def count_cosines(directions: Tensor, chosen: Tensor) -> Cosines:
    """Cosines of the rows `chosen` [rows] of `directions` [n, d] with all other rows."""
    directions = normalize(directions.float(), dim=1)
    counts, nearest = torch.zeros(COSINE_BINS, dtype=torch.int64), []
    for part in chosen.split(ROWS_AT_ONCE):
        table = (directions[part] @ directions.T).clamp_(-1, 1)
        table[torch.arange(len(part)), part] = -2  # with itself: below all bins
        counts += table.histc(COSINE_BINS, -1, 1).long()
        nearest.append(table.amax(dim=1))
    return Cosines(counts, torch.cat(nearest))
