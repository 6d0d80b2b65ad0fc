"""Features that are like a feature: in what they write, and in when they fire."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import Related

ROWS = 512  # features compared with all others at a time
PAIRS = 400_000_000  # of features that fire together, at most looked at


@torch.no_grad()
def neighbours(W_dec: Tensor, k: int = 5) -> Related:
    """The features with the largest cosine of decoder rows [features, d_out]."""
    rows = normalize(W_dec)
    k = min(k, len(rows) - 1)
    units, cosines = [], []
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS] @ rows.T
        mine = torch.arange(len(part), device=part.device)
        part[mine, first + mine] = -2  # not its own neighbour
        found = part.topk(k, dim=1)
        units.append(found.indices.cpu())
        cosines.append(found.values.cpu())
    return Related(torch.cat(units), torch.cat(cosines))


def partners(sample: Sample, k: int = 5) -> Related:
    """The features that fire on the same tokens: tokens on which both do / on which either does."""
    from scipy.sparse import csr_array

    places, owners = sample.places.numpy(), sample.owners().numpy()
    # a dense SAE has so many pairs that fewer tokens have to do
    active = np.bincount(places, minlength=sample.tokens.numel()).astype(np.float64)
    near = (np.square(active).cumsum() <= PAIRS)[places]
    places, owners = places[near], owners[near]
    shape = (sample.features, sample.tokens.numel())
    fires = csr_array((np.ones(len(places), np.float32), (owners, places)), shape)
    counts = np.asarray(fires.sum(axis=1))
    by_token, k = fires.T.tocsr(), min(k, sample.features - 1)
    units, likeness = [], []
    for first in range(0, sample.features, ROWS):
        both = torch.from_numpy((fires[first : first + ROWS] @ by_token).toarray())
        either = torch.from_numpy(counts[first : first + ROWS, None] + counts[None]) - both
        jaccard = both / either.clamp(min=1)
        mine = torch.arange(len(jaccard))
        jaccard[mine, first + mine] = 0
        found = jaccard.topk(k, dim=1)
        units.append(torch.where(found.values > 0, found.indices, -1))
        likeness.append(found.values)
    return Related(torch.cat(units), torch.cat(likeness))
