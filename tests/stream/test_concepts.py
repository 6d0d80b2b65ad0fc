"""Rows of synthetic concepts: the protocol of a source, exact resume, and held-out rows."""

import torch

from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream.batches import BatchStream
from sae_lightning.stream.synthetic import (
    SAMPLED_ROWS,
    ConceptRows,
    HeldOutConcepts,
    SyntheticConfig,
    open_concept_world,
)

SITE = Site(0, Kind.resid)
DATA = SyntheticConfig(concepts=12, dim=5, l0=2.0)


def rows(seed: int = 0, data: SyntheticConfig = DATA) -> ConceptRows:
    return ConceptRows(open_concept_world(data), [SITE], seed=seed, device="cpu")


def stream(seed: int = 0) -> BatchStream:
    return BatchStream(rows(seed), batch=1000, total_batches=12, pool=3000, seed=seed)


def held_out(data: SyntheticConfig = DATA, tokens: int = 100) -> HeldOutConcepts:
    return HeldOutConcepts(open_concept_world(data), seed=data.seed, tokens=tokens, device="cpu")


def test_batches_are_as_many_as_asked_for_and_no_row_comes_twice():
    batches = [batch[SITE] for batch in stream()]
    assert len(batches) == 12
    assert all(batch.shape == (1000, 5) for batch in batches)
    # an activation without any active concept is 0, and may come often
    served = torch.cat(batches)
    served = served[served.abs().sum(dim=1) > 0]
    assert len(served.unique(dim=0)) == len(served) > 8000


def test_rows_come_in_blocks_and_are_numbered():
    source = rows()
    first, second = source.next(1), source.next(10**9)
    assert first.activations[SITE].shape == second.activations[SITE].shape == (SAMPLED_ROWS, 5)
    assert torch.cat([first.sequence_ids, second.sequence_ids]).tolist() == list(
        range(2 * SAMPLED_ROWS)
    )
    assert (source.max_rows, source.epoch, source.llm_seconds) == (SAMPLED_ROWS, 1, 0.0)


def test_a_stream_that_is_restored_goes_on_exactly():
    whole = list(stream())
    half = stream()
    before = [batch for _, batch in zip(range(5), half, strict=False)]
    state = half.state_dict()
    again = stream()
    again.load_state_dict(state)
    after = list(again)
    assert len(before) + len(after) == 12
    for a, b in zip(whole, before + after, strict=True):
        assert torch.equal(a[SITE], b[SITE])


def test_the_seed_of_a_run_decides_its_rows_and_not_its_world():
    a, b = rows(seed=0), rows(seed=1)
    assert torch.equal(a.world.directions, b.world.directions)
    assert not torch.equal(a.next(1).activations[SITE], b.next(1).activations[SITE])
    assert torch.equal(rows(seed=1).next(1).activations[SITE], rows(1).next(1).activations[SITE])


def test_what_is_held_out_is_never_trained_on_whatever_the_seeds():
    kept = held_out()
    alone = {tuple(x.tolist()) for x in kept.activations(SITE) if x.abs().sum() > 0}
    for seed in (0, 1, 2):
        trained = {tuple(x.tolist()) for x in rows(seed).next(1).activations[SITE]}
        assert not alone & trained


def test_held_out_samples_are_made_of_the_strengths_that_come_with_them():
    kept = held_out(tokens=SAMPLED_ROWS + 10)
    assert kept.activations(SITE).shape == (SAMPLED_ROWS + 10, 5)
    assert kept.strengths.shape == (SAMPLED_ROWS + 10, 12)
    assert torch.allclose(kept.strengths @ kept.world.directions, kept.activations(SITE), atol=1e-5)


def test_all_runs_in_a_world_are_judged_by_the_same_samples_in_another_by_others():
    assert torch.equal(held_out().strengths, held_out().strengths)
    other = SyntheticConfig(concepts=12, dim=5, l0=2.0, seed=1)
    assert not torch.equal(held_out().strengths, held_out(other).strengths)
