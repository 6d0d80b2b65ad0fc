"""A few tokens, or one dimension, that hold so much of the variance that EV is about them.

"Massive activations" (Sun et al. 2024, 2402.17762) are as usual as they are few: explained variance
then says how well an SAE knows these, whatever it makes of all other text.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lightning.stream.rows import norms

LONG_SHARE = 1e-3  # share of the tokens
DOMINANT_SHARE = 0.1  # share of the variance, and ten times what as many would hold at random
# Share of the tokens -> share of the variance that they may hold. The second row is for models such
# as Llama 2, where one token of each short sequence (the first full stop) holds nearly everything.
VARIANCE_LIMITS = {LONG_SHARE: DOMINANT_SHARE, 0.05: 0.5}


class LongTokens(NamedTuple):
    """The longest tokens of a set, which dominate its variance."""

    usual: Tensor
    """[n] bool; the others"""
    share: float
    """Of the variance, held by the long ones."""
    max_norm: float
    """What leaves just these out: norms are compared with this multiple of their median."""

    @property
    def number(self) -> int:
        """Number of the long tokens."""
        return int((~self.usual).sum())


@torch.no_grad()
def find_long_tokens(x: Tensor) -> LongTokens | None:
    """Those of x [n, d] without which its longest 0.1 % hold no more than a tenth of the variance,
    and the longest 5 % no more than half; None where they do not as it is, or where it is not
    finite.

        |x|      100  97  11  10   9  ...   1
                 └─ long ┘ └──── usual ────┘     max_norm: between 97 and 11, over the median
    """
    length, order = norms(x).cpu().sort(descending=True)
    mean = x.mean(dim=0, dtype=torch.float32)
    spread = torch.cat([(part.float() - mean).square().sum(dim=1) for part in x.split(4096)])
    # left[j]: n times the variance without the j longest
    left = spread.cpu().double()[order].flip(0).cumsum(0).flip(0)
    limits = [(math.ceil(share * len(x)), limit) for share, limit in VARIANCE_LIMITS.items()]
    bad = sum(_is_much(left, few, limit) for few, limit in limits) > 0
    median = length.median().item()
    if not bad[0] or not median > 0:
        return None
    # from the first good place on, where the next one is shorter by most
    first = int((~bad).nonzero()[0])
    gaps = length[first - 1 : -1] / length[first:]
    count = first + int(gaps[: math.ceil(LONG_SHARE * len(x)) + 1].argmax())
    least, most = length[count].item() / median, length[count - 1].item() / median
    middle = math.sqrt(least * most)
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 9))
    max_norm = next((m for m in rounded if least <= m < most), least)
    return LongTokens(norms(x) <= max_norm * median, 1 - (left[count] / left[0]).item(), max_norm)


def _is_much(left: Tensor, few: int, much: float) -> Tensor:
    """Whether, of what is `left` [n] without the longest, the `few` that follow hold too much."""
    rest = torch.cat([left[few:], torch.zeros(few, dtype=left.dtype)])
    at_random = few / torch.arange(len(left), 0, -1, dtype=left.dtype)
    return left - rest > left * (10 * at_random).clamp(min=much)


class DominantDimension(NamedTuple):
    """A dimension that dominates the variance."""

    index: int
    share: float
    """Of the variance."""
    explained_variance: float
    """Over all other dimensions."""


def find_dominant_dimension(residual: Tensor, total: Tensor) -> DominantDimension | None:
    """Of what remains and of the variance in each dimension [d]; None where none dominates."""
    share, index = (total / total.sum()).max(dim=0)
    if not share > max(DOMINANT_SHARE, 10 / len(total)):
        return None
    others = torch.arange(len(total)) != index
    left = residual[others].sum() / total[others].sum()
    return DominantDimension(index.item(), share.item(), 1 - left.item())
