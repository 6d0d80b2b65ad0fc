"""Ranks the tokens whose logits a feature changes most."""

import torch
from torch import Tensor

from sae_lightning.report.catalogue import LINEAR_BINS, LogitEffect


def rank_tokens(logits: Tensor, top: int) -> LogitEffect:
    """Find the `top` largest and smallest of the changes of each row of `logits` [features,
    vocabulary], how sharp it is, and its histogram."""
    best, worst = logits.topk(top), (-logits).topk(top)
    least = torch.finfo(logits.dtype).tiny ** 0.5
    low, high = -worst.values[:, :1], best.values[:, :1]
    bins = ((logits - low) * (LINEAR_BINS / (high - low).clamp(min=least))).long()
    bins = bins.clamp_(max=LINEAR_BINS - 1)
    histogram = bins.new_zeros(len(bins), LINEAR_BINS)
    histogram.scatter_add_(1, bins, bins.new_ones(()).expand_as(bins))
    square = (logits - logits.mean(-1, keepdim=True)).square_()
    variance = square.mean(-1).clamp(min=least)
    sharpness = square.square_().mean(-1) / variance.square() - 3
    return LogitEffect(
        best.indices, worst.indices, sharpness, best.values, -worst.values, histogram
    )
