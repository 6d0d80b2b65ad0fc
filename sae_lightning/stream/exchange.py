"""Rows of activations that go from rank to rank."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from sae_lightning.llm.sites import Site
from sae_lightning.ranks import Ranks, world


def exchange_rows(
    rows: dict[Site, Tensor],
    counts: Sequence[int],
    sites_by_rank: Sequence[Collection[Site]],
    like: Tensor,
    ranks: Ranks | None = None,
) -> list[dict[Site, Tensor]]:
    """Exchange the rows of one round of LLM batches, in which rank r has run batch r; returns, for
    each batch r, its rows {site: [counts[r], d]} at the sites that this rank wants.

    rows: of this rank's batch, {site: [counts[rank], d]}, at all sites that any rank wants; empty
    for a rank without a batch. counts: the number of rows of each batch, the same on every rank; a
    last round may have fewer batches than ranks. sites_by_rank[r]: the sites that rank r wants.
    like: any tensor [..., d] with the width, dtype and device of the rows. ranks: None for all
    ranks of the run. Each rank sends at most one message to every other.
    """
    ranks = ranks or world()
    if ranks.size == 1:
        return [rows]
    own_sites = sorted(sites_by_rank[ranks.rank])
    # nothing is sent by a rank without a batch, or to a rank without sites
    wanted = {tuple(sorted(sites)) for sites in sites_by_rank if rows and sites}
    stacks = {sites: torch.stack([rows[site] for site in sites]) for sites in wanted}
    outgoing = [
        None if other == ranks.rank else stacks.get(tuple(sorted(sites)))
        for other, sites in enumerate(sites_by_rank)
    ]
    incoming = [
        None if other == ranks.rank else like.new_empty(len(own_sites), count, like.shape[-1])
        for other, count in enumerate(counts)
    ]
    ranks.exchange(outgoing, incoming)
    return [
        {site: rows[site] for site in own_sites}
        if x is None
        else dict(zip(own_sites, x, strict=True))
        for x in incoming
    ]


def apply_together(
    function: Callable[[Tensor], Tensor], x: Tensor, rows_per_call: int, ranks: Ranks
) -> Tensor:
    """Apply a function to this rank's rows x [n, d_in] -> [n, d_out]. All ranks must call the
    function together, on the same rows: each call gets about `rows_per_call` rows of all ranks."""
    if ranks.size == 1:
        return torch.cat([function(part) for part in x.split(rows_per_call)])
    longest = max(ranks.gather_values(len(x)))  # ranks with fewer rows call on zeros too
    padded = x.new_zeros(longest, x.shape[1])
    padded[: len(x)] = x
    results = []
    for part in padded.split(max(1, rows_per_call // ranks.size)):
        y = function(ranks.stack(part).flatten(0, 1))
        results.append(y[ranks.rank * len(part) :][: len(part)])
    return torch.cat(results)[: len(x)]
