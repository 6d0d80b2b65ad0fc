"""Ranks the tokens whose logits a feature changes most."""

import torch
from torch import Tensor

from sae_lightning.report.catalogue import LINEAR_BINS, LogitEffect


def rank_tokens(logits: Tensor, top: int) -> LogitEffect:
    """Summarise each feature's changes of the logits, `logits` [features, vocabulary]: the `top`
    largest and smallest changes, the sharpness (excess kurtosis; -3 if all changes are equal), and
    a histogram."""
    largest, smallest = logits.topk(top), logits.topk(top, largest=False)
    tiny = torch.finfo(logits.dtype).tiny ** 0.5  # the root, because the variance is squared below
    low, high = smallest.values[:, :1], largest.values[:, :1]
    bins = (logits - low).mul_(LINEAR_BINS / (high - low).clamp(min=tiny))
    bins = bins.clamp_(max=LINEAR_BINS - 1).int()
    bins += LINEAR_BINS * torch.arange(len(bins), dtype=bins.dtype, device=bins.device)[:, None]
    histogram = torch.bincount(bins.flatten(), minlength=LINEAR_BINS * len(bins))
    squares = (logits - logits.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1).clamp(min=tiny)
    fourth_powers = squares.square_()
    sharpness = fourth_powers.mean(-1) / variance.square() - 3  # 3: of a normal distribution
    tokens = largest.indices, smallest.indices
    changes = largest.values, smallest.values
    return LogitEffect(*tokens, sharpness, *changes, histogram.view(-1, LINEAR_BINS))
