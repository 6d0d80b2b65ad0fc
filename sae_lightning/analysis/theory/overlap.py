"""Whether decoder rows are nearly orthogonal: cosines between them, and between random directions.

Shapes: n = directions, d = width of the site, rows = directions that are compared with all others.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

COMPARED_ROWS = 1024  # most directions of a kind that are compared with all others
ROWS_AT_ONCE = 256  # directions compared at a time: bounds memory
COSINE_BINS = 2000  # bins from -1 to 1, each 0.001 wide


class Cosines(NamedTuple):
    """Cosines of some directions with all others of their kind."""

    counts: Tensor
    """[COSINE_BINS] int64: number of pairs by cosine"""
    nearest: Tensor
    """[rows] largest cosine of each compared direction with another one"""

    def find_share_above(self, cosine: float) -> float:
        """Share of pairs whose |cosine| exceeds `cosine`, which is rounded to 0.001."""
        middles = (torch.arange(COSINE_BINS) + 0.5) * (2 / COSINE_BINS) - 1
        return (self.counts[middles.abs() > cosine].sum() / self.counts.sum()).item()

    def find_quantile(self, share: float) -> float:
        """The |cosine| that a `share` of the pairs does not exceed, rounded up to 0.001."""
        half = COSINE_BINS // 2
        counts = self.counts[half:] + self.counts[:half].flip(0)  # by |cosine|
        cumulative_share = counts.cumsum(0) / counts.sum()
        bin_index = int((cumulative_share < share).sum())
        return (bin_index + 1) / half  # the bin's upper edge

    def scalars(self) -> dict[str, float]:
        """Summarise the cosines, by the keys that `theory.json` has for them."""
        return {
            "median": self.find_quantile(0.5),
            "99%": self.find_quantile(0.99),
            "above_0.3": self.find_share_above(0.3),
            "nearest": self.nearest.mean().item(),
        }


def compare_directions(decoder: Tensor, covariance_root: Tensor) -> dict[str, Cosines]:
    """Cosines between decoder rows [features, d] (key `decoder`), between as many random directions
    (`random`), and between random directions with the covariance of the activations (`like_data`).

    covariance_root: [d, d] matrix R with R.T @ R = covariance.
    """
    generator = Generator().manual_seed(0)
    chosen = torch.randperm(len(decoder), generator=generator)[:COMPARED_ROWS]
    noise = torch.randn(decoder.shape, generator=generator)
    return {
        "decoder": count_cosines(decoder, chosen),
        "random": count_cosines(noise, chosen),
        "like_data": count_cosines(noise @ covariance_root.float(), chosen),
    }


def count_cosines(directions: Tensor, chosen: Tensor) -> Cosines:
    """Count the cosines of the rows `chosen` [rows] of `directions` [n, d] with all other rows."""
    directions = normalize(directions.float(), dim=1)
    counts, nearest = torch.zeros(COSINE_BINS, dtype=torch.int64), []
    for part in chosen.split(ROWS_AT_ONCE):
        table = (directions[part] @ directions.T).clamp_(-1, 1)
        # a direction is not compared with itself: -2 is in no bin, and never the largest
        table[torch.arange(len(part)), part] = -2
        counts += table.histc(COSINE_BINS, -1, 1).long()
        nearest.append(table.amax(dim=1))
    return Cosines(counts, torch.cat(nearest))
