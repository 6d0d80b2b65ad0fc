"""Evaluation on several ranks gives the numbers of one."""

import pytest
import torch
from rank_processes import run_on_ranks

from sae_lightning.llm.sites import Kind, Site
from sae_lightning.ranks import world
from sae_lightning.stream.exchange import exchange_rows

SITES = [Site(0, Kind.mlp), Site(0, Kind.resid), Site(1, Kind.resid)]
OWN = [SITES[:2], SITES[1:], []]  # the sites of each rank


def exchange() -> list:
    """Exchange two rounds of rows that tell batch and site; the second has one batch only."""
    ranks, sites = world(), [set(own) for own in OWN]
    if ranks.size == 1:
        sites = [set(SITES)]
    results = []
    for counts in ([3, 0, 2][: ranks.size], [4]):
        rows = {
            site: torch.full((counts[ranks.rank], 5), 10 * ranks.rank + i, dtype=torch.bfloat16)
            for i, site in enumerate(SITES)
            if ranks.rank < len(counts)
        }
        like = torch.empty(0, 5, dtype=torch.bfloat16)
        results.append(exchange_rows(rows, counts, sites[: ranks.size], like))
    return results


def run() -> dict:
    return {"exchange": exchange()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{number of ranks: [results of `run` by rank]}"""
    return run_on_ranks(run, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_gets_the_rows_of_its_sites_from_every_batch(results, size):
    for rank, result in enumerate(results[size]):
        own = SITES if size == 1 else OWN[rank]
        for counts, batches in zip(([3, 0, 2][:size], [4]), result["exchange"], strict=True):
            assert len(batches) == len(counts)
            for batch, (rows, count) in enumerate(zip(batches, counts, strict=True)):
                assert list(rows) == own
                for site, x in rows.items():
                    expected = torch.full((count, 5), 10 * batch + SITES.index(site)).bfloat16()
                    assert torch.equal(x, expected), (rank, batch, site)
