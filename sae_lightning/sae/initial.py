"""Initial weights: random directions, or the rescaled weights of another SAE."""

from itertools import pairwise

import torch
from torch import Generator, Tensor

from sae_lightning.ranks import FeatureSplit

NUMBERS_AT_ONCE = 1 << 22  # random numbers drawn at a time


def draw_directions(split: FeatureSplit, d: int, generator: Generator) -> Tensor:
    """[own features, d]: this rank's rows of torch.randn(features, d), which is drawn in pieces and
    never held as a whole."""
    # torch draws 16 numbers at a time and, if the size is not a multiple of 16, the last 16 again:
    # so pieces are multiples of 16, and the last one includes the remainder
    piece_rows = 16 * max(1, NUMBERS_AT_ONCE // (16 * d))
    rows = torch.empty(len(split.own_features), d)
    stops = [*range(piece_rows, split.features - piece_rows + 1, piece_rows), split.features]
    for start, stop in pairwise([0, *stops]):
        piece = torch.randn(stop - start, d, generator=generator)
        # feature i is on rank i % size
        first = (split.ranks.rank - start) % split.ranks.size
        rows[split.count_own(start) : split.count_own(stop)] = piece[first :: split.ranks.size]
    return rows


def rescale_strengths(weights: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """The weights of an SAE with the strengths and thresholds of its features multiplied by
    `factors` [features] and its decoder rows divided by them, which changes no reconstruction."""
    scaled = {
        name: weights[name] * factors
        for name in ("W_enc", "b_enc", "b_mag", "threshold")
        if name in weights
    }
    return weights | scaled | {"W_dec": weights["W_dec"] / factors[:, None]}
