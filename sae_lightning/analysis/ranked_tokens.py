"""Ranks the tokens whose logits a feature changes most."""

import torch
from torch import Tensor

from sae_lightning.report.catalogue import LINEAR_BINS, LogitEffect


def rank_tokens(changes: Tensor, top: int) -> LogitEffect:
    """Summarise how each feature changes the logits, `changes` [features, vocabulary]: the `top`
    largest and smallest changes, the sharpness (excess kurtosis; -3 if all changes are equal), and
    a histogram."""
    largest, smallest = changes.topk(top), changes.topk(top, largest=False)
    tiny = torch.finfo(changes.dtype).tiny ** 0.5  # the root, because the variance is squared below
    low, high = smallest.values[:, :1], largest.values[:, :1]
    bins = (changes - low).mul_(LINEAR_BINS / (high - low).clamp(min=tiny))
    bins = bins.clamp_(max=LINEAR_BINS - 1).int()
    # shifted by feature, so that one bincount makes all histograms
    bins += LINEAR_BINS * torch.arange(len(bins), dtype=bins.dtype, device=bins.device)[:, None]
    histogram = torch.bincount(bins.flatten(), minlength=LINEAR_BINS * len(bins))
    squares = (changes - changes.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1).clamp(min=tiny)
    fourth_powers = squares.square_()
    sharpness = fourth_powers.mean(-1) / variance.square() - 3  # 3: of a normal distribution
    return LogitEffect(
        promoted=largest.indices,
        suppressed=smallest.indices,
        sharpness=sharpness,
        raised=largest.values,
        lowered=smallest.values,
        histogram=histogram.view(-1, LINEAR_BINS),
    )
