"""Features that are like a feature: in what they write, and in when they fire."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import RelatedUnits

BLOCK_FEATURES = 512  # features compared with others at a time
MAX_EXACT_FEATURES = 16_384  # features of which each is compared with all others
HASH_TABLES = 16  # orders of more features, in which each is compared with its block
HASH_DIRECTIONS = 32  # random directions that make an order, twice
MAX_PAIRS = 400_000_000  # of features that fire together, at most looked at


@torch.no_grad()
def find_neighbours(W_dec: Tensor, k: int = 5) -> RelatedUnits:
    """The features with the largest cosine of decoder rows [features, d_out].

    Of more than 16,384 features each is compared with 8,000 others only, so that time grows with
    their number and not with its square. Of 32,768 features in 768 dimensions one in 2,000 pairs at
    a cosine of 0.9 is missed, one in 200 at 0.8; of what is less alike than that, most.
    """
    rows = normalize(W_dec)
    k = min(k, len(rows) - 1)
    units = torch.full((len(rows), k), -1, device=rows.device)
    cosines = rows.new_full((len(rows), k), -2)
    for mine, others in _pick_comparisons(rows):
        table = rows[mine] @ rows[others].T
        table[mine[:, None] == others] = -2  # not its own neighbour
        new = table.topk(min(k, len(others) - 1), dim=1)
        found = others[new.indices]  # [mine, k]
        known = (found[:, :, None] == units[mine][:, None]).any(dim=2)
        likeness = torch.cat([cosines[mine], new.values.masked_fill(known, -2)], dim=1)
        best = likeness.topk(k, dim=1)
        cosines[mine] = best.values
        units[mine] = torch.cat([units[mine], found], dim=1).gather(1, best.indices)
    return RelatedUnits(units.cpu(), cosines.cpu())


def _pick_comparisons(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of rows [n, d] of norm 1, and of those that they are compared with."""
    if len(rows) <= MAX_EXACT_FEATURES:
        everyone = torch.arange(len(rows), device=rows.device)
        for mine in everyone.split(BLOCK_FEATURES):
            yield mine, everyone
        return
    # Rows whose largest component in a random basis is the same are alike (cross-polytope hashing,
    # Andoni et al. 2015); sorted by two of these, blocks are of one size however rows are spread.
    generator = Generator().manual_seed(0)
    centred = rows - rows.mean(dim=0)
    for _ in range(HASH_TABLES):
        basis = torch.randn(rows.shape[1], 2 * HASH_DIRECTIONS, generator=generator).to(rows)
        largest = [
            torch.cat([part, -part], dim=1).argmax(dim=1)
            for part in (centred @ basis).split(HASH_DIRECTIONS, dim=1)
        ]
        order = (largest[0] * 2 * HASH_DIRECTIONS + largest[1]).argsort(stable=True)
        for block in order.split(BLOCK_FEATURES):
            yield block, block


def find_partners(sample: Sample, k: int = 5) -> RelatedUnits:
    """The features that fire on the same tokens: tokens on which both do / on which either does."""
    from scipy.sparse import csr_array

    places, owners = sample.places.numpy(), sample.owners().numpy()
    # a dense SAE has so many pairs that fewer tokens have to do
    active = np.bincount(places, minlength=sample.tokens.numel()).astype(np.float64)
    near = (np.square(active).cumsum() <= MAX_PAIRS)[places]
    places, owners = places[near], owners[near]
    shape = (sample.unit_count, sample.tokens.numel())
    fires = csr_array((np.ones(len(places), np.float32), (owners, places)), shape)
    counts = np.asarray(fires.sum(axis=1))
    by_token, k = fires.T.tocsr(), min(k, sample.unit_count - 1)
    units = torch.full((sample.unit_count, k), -1)
    likeness = torch.zeros(sample.unit_count, k)
    for first in range(0, sample.unit_count, BLOCK_FEATURES):
        both = fires[first : first + BLOCK_FEATURES] @ by_token  # only pairs that there are
        mine = first + np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        others = both.indices
        jaccard = both.data / (counts[mine] + counts[others] - both.data)
        jaccard[mine == others] = 0
        jaccard, others = torch.from_numpy(jaccard), torch.from_numpy(others).long()
        for unit in np.flatnonzero(np.diff(both.indptr) > 1):  # with others than itself
            its = slice(both.indptr[unit], both.indptr[unit + 1])
            found = jaccard[its].topk(min(k, its.stop - its.start))
            there = found.values > 0
            units[first + unit, : len(there)] = torch.where(there, others[its][found.indices], -1)
            likeness[first + unit, : len(there)] = found.values
    return RelatedUnits(units, likeness)
