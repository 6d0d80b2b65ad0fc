"""Schedules: exact values at every step of a short run."""

import pytest

from sae_lightning.schedules import decay, due, warmup

TOTAL = 10


def path(schedule, share, total=TOTAL):
    return [schedule(step, total, share) for step in range(total)]


def test_warmup_rises_in_equal_steps_and_arrives():
    # 4 of 10 updates: 1/4, 2/4, 3/4, 4/4, and 1 ever after
    assert path(warmup, 0.4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_decay_falls_in_equal_steps_and_keeps_the_last_update_useful():
    # the last 4 of 10 updates: 4/4, 3/4, 2/4, 1/4; 0 would come at step 10, which is none
    assert path(decay, 0.4) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("schedule", [warmup, decay])
def test_a_share_of_0_changes_nothing(schedule):
    assert path(schedule, 0.0) == [1] * TOTAL


def test_a_share_of_1_takes_the_whole_run():
    assert path(warmup, 1.0) == pytest.approx([k / 10 for k in range(1, 11)])
    assert path(decay, 1.0) == pytest.approx([k / 10 for k in range(10, 0, -1)])


def test_a_share_need_not_be_a_whole_number_of_updates():
    # 0.25 x 10 = 2.5 updates
    assert path(warmup, 0.25)[:4] == pytest.approx([1 / 2.5, 2 / 2.5, 1, 1])
    assert path(decay, 0.25)[-4:] == pytest.approx([1, 1, 2 / 2.5, 1 / 2.5])


def test_a_run_of_one_update_trains():
    assert [path(s, share, total=1) for s in (warmup, decay) for share in (0, 0.5, 1)] == [[1]] * 6


def test_due_at_each_multiple_of_tokens():
    # 100 tokens an update, due every 250: passed at 300 (250), 500, 800 (750), 1000
    assert [step for step in range(1, 11) if due(step, 100, 250)] == [3, 5, 8, 10]


def test_due_once_an_update_where_batches_are_larger_than_the_interval():
    assert all(due(step, 100, 30) for step in range(1, 50))


def test_due_never_before_the_first_multiple():
    assert not any(due(step, 100, 1000) for step in range(1, 10))
    assert due(10, 100, 1000)


def test_a_resumed_run_is_due_at_the_same_updates():
    # a function of the step alone: nothing to save, nothing to lose
    whole = [due(step, 7, 20) for step in range(1, 101)]
    assert whole[50:] == [due(step, 7, 20) for step in range(51, 101)]
    assert sum(whole) == 700 // 20
