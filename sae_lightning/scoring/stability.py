"""Stable features: those that an SAE trained with another seed has, too.

Decoder rows of two SAEs are matched one to one, pairs with the largest cosine first, down to a
cosine of 0.7. Paulo & Belrose 2025 (arXiv 2501.16615) require this cosine of the encoder rows, too,
and match by the Hungarian algorithm, which takes hours for 131,072 features. Above this cosine few
rows have a second candidate, so that the two matchings hardly differ.

Shapes: features = decoder rows, d_out = width of the target site.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.scoring.duplicates import BLOCK_ROWS

STABLE_COSINE = 0.7


def count_matches(a: Tensor, b: Tensor) -> int:
    """Count the matched pairs of rows of `a` [features of a, d_out] and `b` [features of b, d_out].

    In each round, rows that are each other's nearest are matched and removed, and so are rows whose
    nearest free row is below the threshold. This finds the pairs that a greedy matching over the
    sorted cosines of all pairs would find, without keeping all cosines.
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
    best_a, best_b = (rows.new_full((len(rows),), -2.0) for rows in (a, b))
    nearest_a, nearest_b = (
        torch.zeros(len(rows), dtype=torch.long, device=rows.device) for rows in (a, b)
    )
    for i in range(0, len(a), BLOCK_ROWS):
        for j in range(0, len(b), BLOCK_ROWS):
            cosines = a[i : i + BLOCK_ROWS] @ b[j : j + BLOCK_ROWS].T
            for best, nearest, first, first_other, dim in (
                (best_a, nearest_a, i, j, 1),
                (best_b, nearest_b, j, i, 0),
            ):
                value, index = cosines.max(dim=dim)
                rows = slice(first, first + len(value))
                larger = value > best[rows]
                best[rows] = torch.where(larger, value, best[rows])
                nearest[rows] = torch.where(larger, index + first_other, nearest[rows])
    return (best_a, nearest_a), (best_b, nearest_b)
