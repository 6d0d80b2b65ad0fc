"""Finds the features most similar to each feature: in what they write, and in where they fire."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sae_lightning.analysis.survey.sample import Sample
from sae_lightning.report.catalogue import RelatedUnits

BLOCK_FEATURES = 512  # features compared at a time
MAX_EXACT_FEATURES = 16_384  # up to this number, each is compared with all others
# More features are sorted by random hashes, in HASH_TABLES different orders. In each order, a
# feature is compared only with the BLOCK_FEATURES features of its block.
HASH_TABLES = 16
HASH_DIRECTIONS = 32  # random directions per hash; a table sorts features by two hashes
HASHED_ROWS = 8192  # decoder rows hashed at a time: bounds memory
MAX_PAIRS = 400_000_000  # limit on pairs of features that fire together: bounds time, memory


@torch.no_grad()
def find_neighbours(W_dec: Tensor, k: int = 5) -> RelatedUnits:
    """Find for each feature the others with the most similar decoder rows [features, d_out].

    With more than 16,384 features, each is compared with only about 8,000 others, so time grows
    linearly. With 32,768 features in 768 dimensions, this misses one pair in 2,000 at a cosine of
    0.9, one in 200 at 0.8, and most pairs below that. Returns [features, min(k, features - 1)].
    """
    rows = normalize(W_dec)
    k = min(k, len(rows) - 1)
    units = torch.full((len(rows), k), -1, device=rows.device)
    cosines = rows.new_full((len(rows), k), -2)  # below any real cosine
    for block, others in _pick_comparisons(rows):
        products = rows[block] @ rows[others].T
        products[block[:, None] == others] = -2  # a feature is not its own neighbour
        new = products.topk(min(k, len(others) - 1), dim=1)
        new_units = others[new.indices]  # [block, k]
        # neighbours that an earlier hash table has found must not be listed twice
        listed = (new_units[:, :, None] == units[block][:, None]).any(dim=2)
        candidates = torch.cat([cosines[block], new.values.masked_fill(listed, -2)], dim=1)
        best = candidates.topk(k, dim=1)
        cosines[block] = best.values
        units[block] = torch.cat([units[block], new_units], dim=1).gather(1, best.indices)
    return RelatedUnits(units.cpu(), cosines.cpu())


def _pick_comparisons(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices of decoder rows [features, d] (norm 1) in blocks, each with the indices of the
    decoder rows to compare the block with."""
    if len(rows) <= MAX_EXACT_FEATURES:
        indices = torch.arange(len(rows), device=rows.device)
        for block in indices.split(BLOCK_FEATURES):
            yield block, indices
        return
    # Rows with the same largest component in a random basis are similar (cross-polytope hashing,
    # Andoni et al. 2015): the component's index and sign are the hash. Two hashes sort the rows.
    generator = Generator().manual_seed(0)
    mean = rows.mean(dim=0)
    for _ in range(HASH_TABLES):
        basis = torch.randn(rows.shape[1], 2 * HASH_DIRECTIONS, generator=generator).to(rows)
        products = torch.cat([(part - mean) @ basis for part in rows.split(HASHED_ROWS)])
        first, second = (
            torch.cat([part, -part], dim=1).argmax(dim=1)
            for part in products.split(HASH_DIRECTIONS, dim=1)
        )
        order = (first * 2 * HASH_DIRECTIONS + second).argsort(stable=True)
        for block in order.split(BLOCK_FEATURES):
            yield block, block


def find_partners(sample: Sample, k: int = 5) -> RelatedUnits:
    """Find for each feature the others with the largest Jaccard index of firing: tokens on which
    both fire, divided by tokens on which either fires. A feature that fires together with fewer
    than `k` others is padded with unit -1 and a similarity of 0."""
    from scipy.sparse import csr_array

    places, entry_units = sample.places.numpy(), sample.list_entry_units().numpy()
    # if too many pairs fire on the same tokens (a dense SAE), only the first tokens are used
    l0 = np.bincount(places, minlength=sample.tokens.numel()).astype(np.float64)
    fits = (np.square(l0).cumsum() <= MAX_PAIRS)[places]  # l0 features make l0^2 pairs
    places, entry_units = places[fits], entry_units[fits]
    shape = (sample.unit_count, sample.tokens.numel())
    fires = csr_array((np.ones(len(places), np.float32), (entry_units, places)), shape)
    firing_counts = np.asarray(fires.sum(axis=1))
    by_token, k = fires.T.tocsr(), min(k, sample.unit_count - 1)
    units = torch.full((sample.unit_count, k), -1)
    similarity = torch.zeros(sample.unit_count, k)
    for first in range(0, sample.unit_count, BLOCK_FEATURES):
        # [block, features] tokens on which both fire; only the nonzero entries are stored
        both = fires[first : first + BLOCK_FEATURES] @ by_token
        stored = np.diff(both.indptr)  # number of entries of each row
        feature = first + np.repeat(np.arange(both.shape[0]), stored)
        others = both.indices
        jaccard = both.data / (firing_counts[feature] + firing_counts[others] - both.data)
        jaccard[feature == others] = 0
        jaccard, others = torch.from_numpy(jaccard), torch.from_numpy(others).long()
        for i in np.flatnonzero(stored > 1):  # more than the pair of the feature with itself
            pairs = slice(both.indptr[i], both.indptr[i + 1])
            best = jaccard[pairs].topk(min(k, pairs.stop - pairs.start))
            positive = best.values > 0
            partners = torch.where(positive, others[pairs][best.indices], -1)
            units[first + i, : len(partners)] = partners
            similarity[first + i, : len(partners)] = best.values
    return RelatedUnits(units, similarity)
