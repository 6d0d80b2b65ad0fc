"""Initial weights: random directions, or the rescaled weights of another SAE."""

from itertools import pairwise

import torch
from torch import Generator, Tensor

from sae_lightning.ranks import FeatureSplit

NUMBERS_AT_ONCE = 1 << 22  # random numbers drawn at a time


def draw_directions(split: FeatureSplit, d: int, generator: Generator) -> Tensor:
    """[own features, d]: this rank's rows of torch.randn(features, d), which is drawn in pieces and
    never held as a whole."""
    # torch.randn fills blocks of 16 numbers and, if some are left over, draws the last 16 again.
    # So pieces have a multiple of 16 numbers, and the last piece also has the remaining rows.
    piece_rows = 16 * max(1, NUMBERS_AT_ONCE // (16 * d))
    pieces = max(1, split.features // piece_rows)
    rows = torch.empty(len(split.own_features), d)
    starts = [piece_rows * i for i in range(pieces)]
    for start, stop in pairwise([*starts, split.features]):
        piece = torch.randn(stop - start, d, generator=generator)
        # feature i is on rank i % size
        first_own = (split.ranks.rank - start) % split.ranks.size
        rows[split.count_own(start) : split.count_own(stop)] = piece[first_own :: split.ranks.size]
    return rows


def rescale_strengths(weights: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """The weights of an SAE with strengths and thresholds multiplied by `factors` [features] and
    decoder rows divided by them. Unless features compete, reconstructions stay the same."""
    scaled = {
        name: weights[name] * factors
        for name in ("W_enc", "b_enc", "b_mag", "threshold")
        if name in weights
    }
    return weights | scaled | {"W_dec": weights["W_dec"] / factors[:, None]}
