"""The learning rate against values worked out by hand."""

from functools import partial
from itertools import pairwise

import pytest

from train.schedule import learning_rate

linear = partial(learning_rate, base_lr=1.0, warmup_steps=4, total_steps=12, decay="linear", power=2.0, final_lr=0.0)
square = partial(linear, decay="polynomial")


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.0), (5, 0.875), (8, 0.5), (11, 0.125), (12, 0.0), (500, 0.0)],
)
def test_linear_schedule_matches_hand_computed_values(step, expected):
    assert linear(step) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (3, 1.0), (4, 1.0), (5, 0.765625), (8, 0.25), (11, 0.015625), (12, 0.0)])
def test_polynomial_schedule_is_one_minus_progress_to_the_power(step, expected):
    assert square(step) == pytest.approx(expected, rel=1e-15)


def test_decay_ends_at_final_lr_and_stays_there():
    floor = partial(linear, final_lr=0.2)
    assert floor(8) == pytest.approx(0.6)  # half way between 1.0 and 0.2
    assert floor(12) == floor(10_000) == 0.2


def test_without_warmup_the_first_step_uses_the_base_rate():
    assert linear(0, warmup_steps=0) == 1.0


def test_warmup_may_fill_the_whole_run():
    assert [linear(step, total_steps=4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]


@pytest.mark.parametrize("schedule", [linear, square])
def test_rate_stays_in_bounds_and_never_jumps(schedule):
    rates = [schedule(step, warmup_steps=100, total_steps=1000) for step in range(1000)]
    assert all(0 < rate <= 1 for rate in rates)
    jumps = [abs(after - before) for before, after in pairwise(rates)]
    assert max(jumps) <= 0.01 + 1e-12  # the warm-up's slope, 1/100, is the steepest part
    assert rates.index(max(rates)) == 99


@pytest.mark.parametrize("changes", [{"step": -1}, {"step": 0, "warmup_steps": 13}, {"step": 0, "warmup_steps": -1}])
def test_impossible_arguments_are_refused(changes):
    with pytest.raises(ValueError, match="warmup_steps <= total_steps"):
        linear(**changes)
