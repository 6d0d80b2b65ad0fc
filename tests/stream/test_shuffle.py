"""The shuffle pool: rows come out in random order, and all of them do."""

import pickle

import pytest
import torch

from sae_lightning.errors import UserError
from sae_lightning.llm.sites import Kind, Site
from sae_lightning.stream.shuffle import Pool

SHALLOW, DEEP = Site(0, Kind.resid), Site(2, Kind.mlp)


def rows(start: int, stop: int) -> dict[Site, torch.Tensor]:
    """Row i holds i at one site and -i at the other, which is wider."""
    number = torch.arange(start, stop, dtype=torch.float32)
    return {SHALLOW: number[:, None].repeat(1, 2), DEEP: -number[:, None].repeat(1, 3)}


def filled(n: int, seed: int = 0) -> Pool:
    pool = Pool([SHALLOW, DEEP], capacity=n + 10, seed=seed)
    pool.add(rows(0, n), torch.arange(n))
    return pool


def test_every_row_comes_out_exactly_once_and_aligned():
    pool = Pool([SHALLOW, DEEP], capacity=64, seed=0)
    seen, added = [], 0
    for step in range(200):
        new = [0, 5, 17][step % 3] if len(pool) < 40 else 0
        pool.add(rows(added, added + new), torch.arange(added, added + new))
        added += new
        taken = pool.take(min(7, len(pool)))
        assert torch.equal(taken.activations[SHALLOW][:, 0], -taken.activations[DEEP][:, 2])
        assert torch.equal(taken.activations[SHALLOW][:, 0].long(), taken.sequence_ids)
        seen += taken.sequence_ids.tolist()
    seen += pool.take(len(pool)).sequence_ids.tolist()
    assert len(pool) == 0
    assert sorted(seen) == list(range(added))


def test_every_row_is_as_likely_as_any_other_wherever_it_lies():
    # 2000 pools of 20 rows, 5 taken, then 5 more after the holes were filled: each row is
    # expected 500 times in either draw, sd sqrt(2000 * .25 * .75) = 19.4. Five sds are allowed.
    first, second = torch.zeros(20), torch.zeros(20)
    for seed in range(2000):
        pool = filled(20, seed)
        first[pool.take(5).sequence_ids] += 1
        second[pool.take(5).sequence_ids] += 1
    for count in (first, second):
        assert count.sum() == 10_000
        assert (count - 500).abs().max() < 97


@pytest.mark.slow
def test_pairs_of_rows_are_taken_independently_of_their_distance():
    # Two of 6 rows: 15 pairs, each expected 200 times of 3000, sd sqrt(3000 * 14/225) = 13.7.
    count = torch.zeros(6, 6)
    for seed in range(3000):
        a, b = filled(6, seed).take(2).sequence_ids.sort().values
        count[a, b] += 1
    pairs = count[torch.triu_indices(6, 6, 1).unbind()]
    assert (pairs - 200).abs().max() < 69


def test_the_seed_fixes_the_draw():
    assert torch.equal(filled(50, 1).take(9).sequence_ids, filled(50, 1).take(9).sequence_ids)
    assert not torch.equal(filled(50, 1).take(9).sequence_ids, filled(50, 2).take(9).sequence_ids)


def test_peeking_consumes_nothing_and_leaves_chance_alone():
    pool, other = filled(50), filled(50)
    peeked = pool.peek(10)
    assert len(peeked.sequence_ids.unique()) == 10
    assert peeked.activations[DEEP].shape == (10, 3)
    assert {0, 49} <= set(peeked.sequence_ids.tolist()), "from all over the pool"
    assert len(pool.peek(1000).sequence_ids) == 50, "no more than there are"
    peeked.activations[SHALLOW].zero_()
    assert len(pool) == 50
    for _ in range(5):
        a, b = pool.take(10), other.take(10)
        assert torch.equal(a.sequence_ids, b.sequence_ids)
        assert torch.equal(a.activations[SHALLOW], b.activations[SHALLOW])


def test_a_restored_pool_continues_exactly():
    pool = filled(50)
    pool.take(8)
    state = pickle.loads(pickle.dumps(pool.state_dict()))
    assert [len(r) for r in state["rows"].values()] == [42, 42], "only the filled rows are saved"
    other = Pool([SHALLOW, DEEP], capacity=60, seed=99)
    other.load_state_dict(state)
    for step in range(6):
        for p in (pool, other):
            p.add(rows(100 * step, 100 * step + 3), torch.arange(100 * step, 100 * step + 3))
        a, b = pool.take(8), other.take(8)
        assert torch.equal(a.sequence_ids, b.sequence_ids)
        assert all(torch.equal(a.activations[s], b.activations[s]) for s in (SHALLOW, DEEP))


def test_a_saved_state_does_not_change_when_the_pool_goes_on():
    pool = filled(20)
    state = pool.state_dict()
    before = state["rows"]["resid.0"].clone()
    pool.take(10)
    pool.add(rows(50, 60), torch.arange(50, 60))
    assert torch.equal(state["rows"]["resid.0"], before)


def test_activations_keep_their_dtype():
    pool = Pool([SHALLOW], capacity=8, seed=0)
    pool.add({SHALLOW: torch.ones(4, 2, dtype=torch.bfloat16)}, torch.arange(4))
    assert pool.take(2).activations[SHALLOW].dtype == torch.bfloat16
    assert pool.state_dict()["rows"]["resid.0"].dtype == torch.bfloat16


def test_a_restored_pool_takes_no_rows_of_another_dtype():
    pool = filled(20)
    half = Pool([SHALLOW, DEEP], capacity=60, seed=0)
    half.add({s: x.bfloat16() for s, x in rows(0, 20).items()}, torch.arange(20))
    pool.load_state_dict(half.state_dict())
    with pytest.raises(UserError, match="in float32 here, .* in bfloat16; set llm.dtype=bfloat16"):
        pool.add(rows(20, 30), torch.arange(20, 30))
    assert len(pool) == 20
    assert pool.take(20).activations[DEEP].dtype == torch.bfloat16, "nothing more is needed of it"


def test_a_pool_of_fewer_sites_goes_on_from_the_state_of_one_of_more():
    both, one = filled(50), Pool([DEEP], capacity=60, seed=99)
    both.take(8)
    one.load_state_dict(both.state_dict())
    assert len(one) == 42
    for _ in range(4):
        a, b = both.take(8), one.take(8)
        assert torch.equal(a.sequence_ids, b.sequence_ids)
        assert b.activations.keys() == {DEEP}
        assert torch.equal(a.activations[DEEP], b.activations[DEEP])


def test_a_pool_does_not_go_on_from_a_state_without_its_site():
    pool = Pool([SHALLOW, Site(1, Kind.attn)], capacity=60, seed=0)
    with pytest.raises(UserError, match="read resid.0, mlp.2, not attn.1; resume it with its own"):
        pool.load_state_dict(filled(20).state_dict())
