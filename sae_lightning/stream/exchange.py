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
    """Exchange the rows of a round: rank r has run LLM batch r. Returns a list with the rows
    {site: [counts[r], d]} of each LLM batch r, at the sites that this rank wants.

    rows: those of the LLM batch that this rank has run, {site: [counts[rank], d]}, at all sites
    that any rank wants; empty if it has run none, as a last round may have fewer LLM batches than
    ranks. counts[r]: number of rows of LLM batch r; every rank passes the same list.
    sites_by_rank[r]: the sites that rank r wants; may be empty. like: any tensor [..., d] with the
    width, dtype and device of the rows. ranks: None for all ranks of the run.
    """
    ranks = ranks or world()
    if ranks.size == 1:
        return [rows]
    wanted = [tuple(sorted(sites)) for sites in sites_by_rank]
    own_sites = wanted[ranks.rank]
    stacks: dict[tuple[Site, ...], Tensor] = {}  # one for all ranks that want the same sites
    for sites in wanted:
        if rows and sites and sites not in stacks:
            stacks[sites] = torch.stack([rows[site] for site in sites])
    outgoing = [stacks.get(sites) for sites in wanted]  # None: nothing is sent
    outgoing[ranks.rank] = None
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
    """Apply a function to this rank's rows x [n, d_in] -> [n, d_out]. All ranks call the function
    together, with the same rows: about `rows_per_call`, an equal part from each rank."""
    if ranks.size == 1:
        return torch.cat([function(part) for part in x.split(rows_per_call)])
    longest = max(ranks.gather_values(len(x)))
    padded = x.new_zeros(longest, x.shape[1])  # every rank makes the same number of calls
    padded[: len(x)] = x
    results = []
    for part in padded.split(max(1, rows_per_call // ranks.size)):
        y = function(ranks.stack(part).flatten(0, 1))
        start = ranks.rank * len(part)  # of this rank's rows
        results.append(y[start : start + len(part)])
    return torch.cat(results)[: len(x)]
