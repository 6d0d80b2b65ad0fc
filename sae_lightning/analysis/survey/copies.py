"""Features that write the same are shown as one: the best ranked of them, and those like it."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.report.catalogue import RelatedUnits
from sae_lightning.scoring.duplicates import COPY_COSINE


def find_originals(W_dec: Tensor, neighbours: RelatedUnits, ranking: Tensor) -> Tensor:
    """[features] the feature under which each is shown: itself, unless it is a copy of another.

    Taken in the order of `ranking` [features], each that is no copy yet gathers those that nearest
    neighbours lead to, over any number of steps, as long as they are like *itself*
    (cosine > COPY_COSINE), not only like the one before: copies are alike, no chain of unlike
    features.
    """
    near = (neighbours.likeness > COPY_COSINE) & (neighbours.units >= 0)
    one, column = near.numpy().nonzero()
    other = neighbours.units.numpy()[one, column]
    # who is near is so both ways, though not always among the nearest of the other
    one, other = np.concatenate([one, other]), np.concatenate([other, one])
    other = other[one.argsort(kind="stable")]
    ends = np.bincount(one, minlength=len(W_dec)).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
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
