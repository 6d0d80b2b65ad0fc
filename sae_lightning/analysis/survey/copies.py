"""Finds copies, features that write almost the same, so that pages show each group as one."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.report.catalogue import RelatedUnits
from sae_lightning.scoring.duplicates import COPY_COSINE


def find_originals(W_dec: Tensor, neighbours: RelatedUnits, ranking: Tensor) -> Tensor:
    """Find the original of each feature [features]: the feature itself, unless it is a copy.

    Greedy, in the order of `ranking` [features]: a feature that is not yet a copy is an original.
    Its copies are the features with a cosine > COPY_COSINE to the original itself that are reached
    from neighbour to neighbour.
    """
    near = (neighbours.likeness > COPY_COSINE) & (neighbours.units >= 0)
    unit, column = near.numpy().nonzero()
    other = neighbours.units.numpy()[unit, column]
    # made symmetric: one of a pair may be missing from the other's list of nearest neighbours
    unit, other = np.concatenate([unit, other]), np.concatenate([other, unit])
    other = other[unit.argsort(kind="stable")]
    ends = np.bincount(unit, minlength=len(W_dec)).cumsum()
    starts = np.concatenate([[0], ends[:-1]])  # where each feature's neighbours begin
    original, free = np.arange(len(W_dec)), ends > starts
    ranking = ranking.numpy()
    for unit in ranking[free[ranking]]:
        if not free[unit]:
            continue
        free[unit], reached = False, np.array([unit])
        while len(reached):
            linked = np.unique(np.concatenate([other[starts[u] : ends[u]] for u in reached]))
            linked = linked[free[linked]]
            rows = normalize(W_dec[np.append(linked, unit)]).cpu()
            reached = linked[(rows[:-1] @ rows[-1] > COPY_COSINE).numpy()]
            free[reached], original[reached] = False, unit
    return torch.from_numpy(original)
