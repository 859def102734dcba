"""The learning rate against values worked out by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest

from train.config import ScheduleConfig
from train.schedule import Curve, build_curve

BATCH = 8
LINEAR = Curve(lr=1.0, warmup=4 * BATCH, length=12 * BATCH, power=1.0, final_lr=0.0)
SQUARE = replace(LINEAR, power=2.0)


def rate(curve, step):
    return curve.at(step * BATCH, BATCH)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.0), (5, 0.875), (8, 0.5), (11, 0.125), (12, 0.0), (500, 0.0)],
)
def test_linear_schedule_matches_hand_computed_values(step, expected):
    assert rate(LINEAR, step) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (3, 1.0), (4, 1.0), (5, 0.765625), (8, 0.25), (11, 0.015625), (12, 0.0)])
def test_polynomial_schedule_is_one_minus_progress_to_the_power(step, expected):
    assert rate(SQUARE, step) == pytest.approx(expected, rel=1e-15)


def test_decay_ends_at_final_lr_and_stays_there():
    floor = replace(LINEAR, final_lr=0.2)
    assert rate(floor, 8) == pytest.approx(0.6)  # half way between 1.0 and 0.2
    assert rate(floor, 12) == rate(floor, 10_000) == 0.2


def test_without_warmup_the_first_step_uses_the_base_rate():
    assert rate(replace(LINEAR, warmup=0), 0) == 1.0


def test_warmup_may_fill_the_whole_run():
    assert [rate(replace(LINEAR, length=LINEAR.warmup), step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]


@pytest.mark.parametrize("curve", [LINEAR, SQUARE])
def test_rate_stays_in_bounds_and_never_jumps(curve):
    rates = [rate(replace(curve, warmup=100 * BATCH, length=1000 * BATCH), step) for step in range(1000)]
    assert all(0 < rate <= 1 for rate in rates)
    jumps = [abs(after - before) for before, after in pairwise(rates)]
    assert max(jumps) <= 0.01 + 1e-12  # the warm-up's slope, 1/100, is the steepest part
    assert rates.index(max(rates)) == 99


def test_a_batch_that_reaches_over_the_end_of_the_warmup_uses_the_full_rate():
    assert LINEAR.at(LINEAR.warmup - 1, BATCH) == 1.0


@pytest.mark.parametrize(("done", "batch"), [(-1, BATCH), (0, 0)])
def test_impossible_arguments_are_refused(done, batch):
    with pytest.raises(ValueError, match="need done >= 0 and batch >= 1"):
        LINEAR.at(done, batch)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmup_epochs": 1.5}, Curve(0.1, 15 * BATCH, 800, 1.0, 0.0)),
        ({"warmup_steps": 3, "final_lr": 0.01}, Curve(0.1, 3 * BATCH, 800, 1.0, 0.01)),
        ({"decay": "polynomial", "power": 3.0}, Curve(0.1, 0, 800, 3.0, 0.0)),
        ({"decay": "linear", "power": 3.0}, Curve(0.1, 0, 800, 1.0, 0.0)),
    ],
)
def test_a_recipes_schedule_becomes_a_curve_over_images(schedule, expected):
    assert build_curve(ScheduleConfig(**schedule), 0.1, batch=BATCH, steps_per_epoch=10, length=800) == expected


def test_a_warmup_longer_than_its_curve_is_refused():
    with pytest.raises(ValueError, match="a warm-up of 20 steps of 8 images is longer than the 100 images"):
        build_curve(ScheduleConfig(warmup_epochs=2), 0.1, batch=BATCH, steps_per_epoch=10, length=100)
