"""Schedules: exact values at every step of a short run."""

import math

import pytest

from sae_lightning.training.schedules import (
    compute_decay,
    compute_feedback,
    compute_warmup,
    is_due,
    measure_l0_error,
)

TOTAL = 10


def path(schedule, share, total=TOTAL):
    return [schedule(step, total, share) for step in range(total)]


def test_warmup_rises_in_equal_steps_and_arrives():
    # 4 of 10 updates: 1/4, 2/4, 3/4, 4/4, and 1 ever after
    assert path(compute_warmup, 0.4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_decay_falls_in_equal_steps_and_keeps_the_last_update_useful():
    # the last 4 of 10 updates: 4/4, 3/4, 2/4, 1/4; 0 would come at step 10, which is none
    assert path(compute_decay, 0.4) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("schedule", [compute_warmup, compute_decay])
def test_a_share_of_0_changes_nothing(schedule):
    assert path(schedule, 0.0) == [1] * TOTAL


def test_a_share_of_1_takes_the_whole_run():
    assert path(compute_warmup, 1.0) == pytest.approx([k / 10 for k in range(1, 11)])
    assert path(compute_decay, 1.0) == pytest.approx([k / 10 for k in range(10, 0, -1)])


def test_a_share_need_not_be_a_whole_number_of_updates():
    # 0.25 x 10 = 2.5 updates
    assert path(compute_warmup, 0.25)[:4] == pytest.approx([1 / 2.5, 2 / 2.5, 1, 1])
    assert path(compute_decay, 0.25)[-4:] == pytest.approx([1, 1, 2 / 2.5, 1 / 2.5])


def test_a_run_of_one_update_trains():
    for schedule in (compute_warmup, compute_decay):
        assert [path(schedule, share, total=1) for share in (0, 0.5, 1)] == [[1]] * 3


def test_due_at_each_multiple_of_tokens():
    # 100 tokens an update, due every 250: passed at 300 (250), 500, 800 (750), 1000
    assert [step for step in range(1, 11) if is_due(step, 100, 250)] == [3, 5, 8, 10]


def test_due_once_an_update_where_batches_are_larger_than_the_interval():
    assert all(is_due(step, 100, 30) for step in range(1, 50))


def test_due_never_before_the_first_multiple():
    assert not any(is_due(step, 100, 1000) for step in range(1, 10))
    assert is_due(10, 100, 1000)


def test_a_resumed_run_is_due_at_the_same_updates():
    # a function of the step alone: nothing to save, nothing to lose
    whole = [is_due(step, 7, 20) for step in range(1, 101)]
    assert whole[50:] == [is_due(step, 7, 20) for step in range(51, 101)]
    assert sum(whole) == 700 // 20


def test_the_error_of_l0_is_a_bounded_logarithm():
    assert measure_l0_error(50, 50) == 0
    assert measure_l0_error(60, 50) == pytest.approx(math.log(1.2))
    assert measure_l0_error(40, 50) == pytest.approx(math.log(0.8))
    assert measure_l0_error(50 * math.e, 50) == pytest.approx(1)
    assert [measure_l0_error(l0, 50) for l0 in (1e6, 200, 10, 0)] == [1, 1, -1, -1]


def test_a_coefficient_at_its_target_stays():
    assert [compute_feedback(0, 0, step, total=100) for step in (1, 50, 100)] == [1, 1, 1]


def test_a_lasting_error_moves_the_coefficient_by_its_tenfold_in_a_run():
    # in the middle exp(30 x 500^2 / 1000^3 x 0.2) an update
    assert compute_feedback(0.2, 0.2, 500, total=1000) == pytest.approx(math.exp(0.0015))
    assert compute_feedback(-0.2, -0.2, 500, total=1000) == pytest.approx(math.exp(-0.0015))
    # slower before, faster after: 30 / 1000^3 x (1^2 + ... + 1000^2) = 10.015
    whole = math.prod(compute_feedback(0.2, 0.2, step, total=1000) for step in range(1, 1001))
    assert whole == pytest.approx(math.exp(0.2 * 10.015005))


def test_a_change_is_answered_at_once():
    assert compute_feedback(0.3, 0.1, 500, total=1000) == pytest.approx(math.exp(0.00225 + 0.2))
    # too many still, but fewer than before: the coefficient already falls
    assert compute_feedback(0.1, 0.3, 500, total=1000) < 1


def test_noise_in_l0_does_not_add_up():
    errors = [0.5, -0.5] * 50
    product = 1.0
    for before, now in zip(errors, errors[1:], strict=False):
        product *= compute_feedback(now, before, 50, total=100)
    # changes cancel but for the last: exp(-0.5 - 0.5), and the sum of errors after the first
    assert product == pytest.approx(math.exp(-1 + 7.5 / 100 * -0.5))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_where_l0_falls_as_a_power_of_the_coefficient_the_target_is_reached(power):
    """L0 follows the coefficient with a delay of some ten updates, as weights have to change."""
    log_l0, log_coefficient, before = math.log(400), 0.0, 1.0
    path = []
    for step in range(1, 501):
        log_l0 += 0.1 * (math.log(400) - power * log_coefficient - log_l0)
        now = measure_l0_error(math.exp(log_l0), 50)
        log_coefficient += math.log(compute_feedback(now, before, step, total=500))
        before = now
        path.append(math.exp(log_l0))
    assert path[-1] == pytest.approx(50, rel=0.1 if power < 1 else 0.03)
    assert min(path) > 35, "it does not overshoot by much"
