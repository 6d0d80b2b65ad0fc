"""Stable features: those that an SAE trained with another seed has, too.

Decoder rows of two SAEs are matched one to one, pairs with the largest cosine first, down to a
cosine of 0.7. Paulo & Belrose 2025 (arXiv 2501.16615) require this cosine of the encoder rows, too,
and match by the Hungarian algorithm, which takes hours for 131,072 features. The two algorithms
hardly differ here, because few rows have a cosine above 0.7 with two rows of the other SAE.

Shapes: features = decoder rows, d_out = width of the target site.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.scoring.duplicates import BLOCK_ROWS

STABLE_COSINE = 0.7


def count_matches(a: Tensor, b: Tensor) -> int:
    """Count the matched pairs of rows of `a` [features of a, d_out] and `b` [features of b, d_out].

    In each round, rows that are each other's nearest are matched and removed. Rows whose nearest
    free row is not above the threshold are removed, too. This finds the pairs that a greedy
    matching over the sorted cosines of all pairs would find, without keeping all cosines.
    """
    a, b = normalize(a), normalize(b)
    matched = 0
    while len(a) and len(b):
        (cosine_a, nearest_a), (cosine_b, nearest_b) = _find_nearest(a, b)
        mutual = nearest_b[nearest_a] == torch.arange(len(a), device=a.device)
        mutual &= cosine_a > STABLE_COSINE
        if not mutual.any():
            break
        matched += int(mutual.sum())
        free_b = cosine_b > STABLE_COSINE
        free_b[nearest_a[mutual]] = False
        a, b = a[(cosine_a > STABLE_COSINE) & ~mutual], b[free_b]
    return matched


def _find_nearest(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For each row of a, find the nearest row of b, and vice versa. Returns (cosines, indices) for
    the rows of a, then for those of b; of rows with equal cosines, the first is the nearest."""
    best_a, best_b = a.new_full((len(a),), -2.0), b.new_full((len(b),), -2.0)
    nearest_a, nearest_b = (torch.zeros_like(best, dtype=torch.long) for best in (best_a, best_b))
    for i in range(0, len(a), BLOCK_ROWS):
        for j in range(0, len(b), BLOCK_ROWS):
            rows_a, rows_b = slice(i, i + BLOCK_ROWS), slice(j, j + BLOCK_ROWS)
            cosines = a[rows_a] @ b[rows_b].T
            _keep_larger(best_a[rows_a], nearest_a[rows_a], cosines, first_other=j)
            _keep_larger(best_b[rows_b], nearest_b[rows_b], cosines.T, first_other=i)
    return (best_a, nearest_a), (best_b, nearest_b)


def _keep_larger(best: Tensor, nearest: Tensor, cosines: Tensor, first_other: int) -> None:
    """Update `best` and `nearest` [rows] in place where a cosine [rows, others] is larger than
    `best`. The first of the others has the index `first_other`."""
    cosine, index = cosines.max(dim=1)
    is_larger = cosine > best
    best.copy_(torch.where(is_larger, cosine, best))
    nearest.copy_(torch.where(is_larger, index + first_other, nearest))
