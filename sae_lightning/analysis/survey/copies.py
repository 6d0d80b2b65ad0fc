"""Finds copies, features that write almost the same direction, so that pages list them as one."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.report.catalogue import RelatedUnits
from sae_lightning.scoring.duplicates import COPY_COSINE


def find_originals(W_dec: Tensor, neighbours: RelatedUnits, ranking: Tensor) -> Tensor:
    """Find the original of each feature [features]: the feature itself, unless it is a copy.

    Greedy, in the order of `ranking` [features], indices of all features, the best first: a feature
    that is not yet a copy becomes an original. Its copies are the features that a search from
    neighbour to neighbour reaches, through features with a cosine > COPY_COSINE to the original.
    """
    is_near = (neighbours.similarity > COPY_COSINE) & (neighbours.units >= 0)  # -1 is padding
    features, column = is_near.numpy().nonzero()
    others = neighbours.units.numpy()[features, column]
    # made symmetric: one feature of a pair may be missing from the other's list of neighbours
    features, others = np.concatenate([features, others]), np.concatenate([others, features])
    others = others[features.argsort(kind="stable")]
    # the neighbours of feature i are others[starts[i] : ends[i]]
    ends = np.bincount(features, minlength=len(W_dec)).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    original = np.arange(len(W_dec))
    undecided = ends > starts  # a feature without near neighbours is its own original
    for candidate in ranking.numpy():
        if not undecided[candidate]:
            continue
        undecided[candidate], reached = False, np.array([candidate])
        while len(reached):
            linked = np.unique(np.concatenate([others[starts[i] : ends[i]] for i in reached]))
            linked = linked[undecided[linked]]
            # the candidate's row comes last
            rows = normalize(W_dec[np.append(linked, candidate)]).cpu()
            reached = linked[(rows[:-1] @ rows[-1] > COPY_COSINE).numpy()]
            undecided[reached], original[reached] = False, candidate
    return torch.from_numpy(original)
