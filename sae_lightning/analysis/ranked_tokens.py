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
    bins = (logits - low).mul_(LINEAR_BINS / (high - low).clamp(min=least))
    bins = bins.clamp_(max=LINEAR_BINS - 1).int()
    bins += LINEAR_BINS * torch.arange(len(bins), dtype=bins.dtype, device=bins.device)[:, None]
    histogram = torch.bincount(bins.flatten(), minlength=LINEAR_BINS * len(bins))
    square = (logits - logits.mean(-1, keepdim=True)).square_()
    variance = square.mean(-1).clamp(min=least)
    sharpness = square.square_().mean(-1) / variance.square() - 3
    tokens = best.indices, worst.indices
    changes = best.values, -worst.values
    return LogitEffect(*tokens, sharpness, *changes, histogram.view(-1, LINEAR_BINS))
