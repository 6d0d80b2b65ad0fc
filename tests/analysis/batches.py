"""Hand-made batches of text and features."""

import torch

from sae_lightning.analysis.collect import EncodedBatch


def pick_active(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Strengths [sequences, context, units] -> those of the active units, and their indices."""
    units = (features.flatten(0, 1).amax(dim=0) > 0).nonzero().squeeze(1)
    return features[..., units], units


def batches(features: torch.Tensor, tokens: torch.Tensor | None = None, size: int = 3):
    """Batches of `size` sequences; features [sequences, context, units]. Position 0 is BOS."""
    sequences, context, _ = features.shape
    if tokens is None:
        tokens = torch.arange(sequences * context).view(sequences, context)
    keep = torch.ones(sequences, context, dtype=torch.bool)
    keep[:, 0] = False
    features = features.masked_fill(~keep[..., None], 0)
    x = torch.zeros(sequences, context, 2)
    ids = torch.arange(sequences)
    parts = [each.split(size) for each in (tokens, keep, x, features, ids)]
    for tokens, keep, x, features, ids in zip(*parts, strict=True):
        yield EncodedBatch(tokens, keep, x, x, pick_active(features), ids)


def sparse(*shape: int, share: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Random strengths of which `share` are not 0."""
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=random) * 4
    return values.masked_fill(torch.rand(shape, generator=random) > share, 0)
