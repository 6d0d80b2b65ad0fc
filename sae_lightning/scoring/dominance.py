"""Detects whether a few tokens, or one dimension, hold much of the variance.

"Massive activations" (Sun et al. 2024, 2402.17762) occur in most LLMs, on few tokens. Explained
variance then measures how well an SAE reconstructs these tokens, and says little about the others.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.stream.rows import compute_norms

FEW_TOKENS_SHARE = 1e-3  # "a few tokens": at most this share of all tokens
DOMINANT_SHARE = 0.1  # a few tokens, or one dimension, dominate above this share of the variance
# Share of the tokens -> share of the variance. The tokens of largest norm dominate if they hold
# more than this share of the variance, and more than ten times their share of the tokens. Llama 2
# needs the second entry: the first full stop of each short sequence holds nearly all the variance.
VARIANCE_LIMITS = {FEW_TOKENS_SHARE: DOMINANT_SHARE, 0.05: 0.5}


class DominantTokens(NamedTuple):
    """The few tokens of largest norm that dominate the variance of a set of n tokens."""

    usual: Tensor
    """[n] bool: true for all tokens that are not dominant."""
    share: float
    """Share of the variance that the dominant tokens hold."""
    max_norm: float
    """The `data.max_norm`, a multiple of the median norm, that leaves out the dominant tokens."""

    @property
    def token_count(self) -> int:
        """Number of dominant tokens in the set."""
        return int((~self.usual).sum())


@torch.no_grad()
def find_dominant_tokens(x: Tensor) -> DominantTokens | None:
    """Find the dominant tokens of x [n, d]. Tokens are removed, the largest norm first, until none
    dominate the rest. Up to 0.1 % more are removed, to cut where the norm drops most.
    None if no token is dominant, or x is not finite.

        |x|      100  97     11  10   9  ...   1
                 dominant    └──── usual ─────┘     max_norm * median: between 11 and 97
    """
    norms, order = compute_norms(x).cpu().sort(descending=True)
    mean = x.mean(dim=0, dtype=torch.float32)
    squares = torch.cat([(part.float() - mean).square().sum(dim=1) for part in x.split(4096)])
    # remaining[j]: sum of squared distances from the mean, without the j tokens of largest norm
    remaining = squares.cpu().double()[order].flip(0).cumsum(0).flip(0)
    dominated = torch.zeros(len(x), dtype=torch.bool)  # [n], like `remaining`
    for token_share, limit in VARIANCE_LIMITS.items():
        dominated |= _is_dominated(remaining, math.ceil(token_share * len(x)), limit)
    median = norms.median().item()
    if not dominated[0] or not median > 0:
        return None
    fewest = int((~dominated).nonzero()[0])
    most = min(fewest + math.ceil(FEW_TOKENS_SHARE * len(x)), len(x) - 1)
    counts = torch.arange(fewest, most + 1)  # numbers of tokens that may be removed
    drops = norms[counts - 1] / norms[counts]  # from the last removed token to the first kept one
    count = int(counts[drops.argmax()])
    lowest, highest = norms[count].item() / median, norms[count - 1].item() / median
    # between these norms, the number nearest to the middle that has the fewest digits
    middle = math.sqrt(lowest * highest)
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 9))
    max_norm = next((m for m in rounded if lowest <= m < highest), lowest)
    return DominantTokens(
        compute_norms(x) <= max_norm * median,
        1 - (remaining[count] / remaining[0]).item(),
        max_norm,
    )


def _is_dominated(remaining: Tensor, k: int, limit: float) -> Tensor:
    """Whether, without the j tokens of largest norm, the k largest remaining ones hold more than
    `limit` of the remaining variance, and more than ten times their share of the remaining tokens:
    bool [n], for j = 0 to n - 1. `remaining` [n]: sums of squares without the j tokens."""
    without_k = torch.cat([remaining[k:], torch.zeros(k, dtype=remaining.dtype)])
    tokens = torch.arange(len(remaining), 0, -1, dtype=remaining.dtype)  # n - j remain
    return remaining - without_k > remaining * (10 * (k / tokens)).clamp(min=limit)


class DominantDimension(NamedTuple):
    """A dimension that dominates the variance."""

    index: int
    share: float
    """Share of the variance that it holds."""
    explained_variance: float
    """Explained variance over all other dimensions."""


def find_dominant_dimension(residual: Tensor, variance: Tensor) -> DominantDimension | None:
    """Find the dimension that holds more than DOMINANT_SHARE of the variance, and more than ten
    times the mean share; None if there is none. `residual` [d] and `variance` [d]: each dimension's
    squared error and squared distance from the mean, summed over tokens."""
    share, index = (variance / variance.sum()).max(dim=0)
    if not share > max(DOMINANT_SHARE, 10 / len(variance)):
        return None
    others = torch.arange(len(variance)) != index
    unexplained = residual[others].sum() / variance[others].sum()
    return DominantDimension(index.item(), share.item(), 1 - unexplained.item())
