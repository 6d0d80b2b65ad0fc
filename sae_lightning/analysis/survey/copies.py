"""Finds copies, features that write the same, so that pages show each group of them as one."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.report.catalogue import RelatedUnits
from sae_lightning.scoring.duplicates import COPY_COSINE


def find_originals(W_dec: Tensor, neighbours: RelatedUnits, ranking: Tensor) -> Tensor:
    """[features] the feature under which each is shown: itself, unless it is a copy of another.

    Greedy, in the order of `ranking` [features]: a feature that is no copy yet becomes an original
    and takes as copies all features that it reaches over nearest neighbours and that have a cosine
    > COPY_COSINE with *it*, not only with the neighbour on the way.
    """
    near = (neighbours.likeness > COPY_COSINE) & (neighbours.units >= 0)
    unit, column = near.numpy().nonzero()
    other = neighbours.units.numpy()[unit, column]
    # nearness is mutual, though either may be missing from the other's list of nearest neighbours
    unit, other = np.concatenate([unit, other]), np.concatenate([other, unit])
    other = other[unit.argsort(kind="stable")]
    ends = np.bincount(unit, minlength=len(W_dec)).cumsum()
    starts = np.concatenate([[0], ends[:-1]])  # of each feature's neighbours in `other`
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
