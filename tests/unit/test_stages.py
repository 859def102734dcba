"""The stage manager alone: lengths, switches by threshold, what is handed on, the learning rate, and going on from a checkpoint."""

import json
import math

import pytest
import torch

from train.config import ConfigError, RunConfig
from train.stages import SmoothedMean, StageLosses, StageManager, plan_stages

EARLY = {"name": "early", "epochs": 2, "sample_rate": 0.5, "update_expectation": True}
STABLE = {"name": "stable", "steps": 4, "centers": "pco"}


def recipe(*stages, **sections):
    return RunConfig.model_validate(
        {"output": "o", "data": {"path": "d"}, "batch": {"micro_batch_size": 4}, "stages": list(stages), **sections}
    )


def manager(*stages, num_images=80, world_size=2, **sections):
    """10 micro-batches an epoch, unless told otherwise."""
    return StageManager(*plan_stages(recipe(*stages, **sections), num_images, world_size))


def walk(machine, squares=(), agree=float):
    """(name, learning rate) of every step; ``squares``: what each step measures (the last one for all later steps)."""
    taken, step = [], 0
    while step < machine.total_steps:
        taken.append((machine.stage.name, machine.learning_rate(step)))
        step += 1
        square = squares[min(step, len(squares)) - 1] if squares else 0.0
        if square is not None:
            machine.observe(torch.tensor(square))
        machine.finish_step(step, agree)
    return taken


def names(taken):
    """{stage: steps} in order."""
    counts = {}
    for name, _ in taken:
        counts[name] = counts.get(name, 0) + 1
    return counts


def test_epochs_become_optimizer_steps_and_stages_follow_each_other():
    machine = manager(EARLY, STABLE, num_images=57, batch={"micro_batch_size": 4, "grad_accum_steps": 2})
    # 57 images are three global batches of 16 an epoch, and the early stage has two epochs
    assert machine.total_steps == 6 + 4
    assert names(walk(machine)) == {"early": 6, "stable": 4}


def test_a_fixed_global_batch_takes_as_many_steps_whatever_the_number_of_ranks():
    for world_size, accumulation in ((2, 4), (4, 2), (8, 1)):
        stages, _ = plan_stages(recipe(EARLY, batch={"micro_batch_size": 4, "global_batch_size": 32}), 320, world_size)
        assert (stages[0].grad_accum_steps, stages[0].images_per_step, stages[0].steps) == (accumulation, 32, 20)


def test_a_stage_has_its_own_margin_and_batch_or_the_runs():
    last = STABLE | {"margin": {"kind": "adaface"}, "batch": {"micro_batch_size": 2, "grad_accum_steps": 3}}
    (early, stable), _ = plan_stages(recipe(EARLY, last), 80, 2)
    assert (early.margin.kind, early.micro_batch_size, early.images_per_step, early.steps_per_epoch) == ("unified", 4, 8, 10)
    assert (stable.margin.kind, stable.micro_batch_size, stable.images_per_step, stable.steps_per_epoch) == ("adaface", 2, 12, 6)


def until(threshold, **more):
    return {"target_cosine_square": threshold, "smoothing": 0.0, "check_every": 1, **more}


THREE = [
    {"name": "alignment", "epochs": 1, "until": until(0.2)},
    {"name": "stabilization", "epochs": 1, "until": until(0.35)},
    {"name": "refinement", "epochs": 1},
]


def test_a_threshold_ends_a_stage_and_the_next_takes_over_what_is_left():
    squares = [0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.36]
    taken = walk(manager(*THREE), squares)
    assert names(taken) == {"alignment": 3, "stabilization": 4, "refinement": 23}


def test_a_threshold_that_is_never_met_leaves_the_stages_as_planned():
    assert names(walk(manager(*THREE), [0.1])) == {"alignment": 10, "stabilization": 10, "refinement": 10}


def test_when_stages_switch_does_not_change_the_learning_rate_of_a_step():
    decay = {"schedule": {"warmup_epochs": 1.5, "decay": "polynomial", "power": 2.0}}
    early = [lr for _, lr in walk(manager(*THREE, **decay), [0.5])]
    late = [lr for _, lr in walk(manager(*THREE, **decay), [0.0])]
    assert early == late
    assert len(late) == 30
    assert max(late) == late[14] == 1e-3
    assert late[-1] == pytest.approx(1e-3 * (1 / 15) ** 2)


def test_a_smaller_batch_takes_over_images_not_steps():
    half = THREE[2] | {"batch": {"micro_batch_size": 2}}
    machine = manager(THREE[0], THREE[1], half, schedule={"warmup_steps": 0})
    taken = walk(machine, [0.5])
    assert names(taken) == {"alignment": 1, "stabilization": 1, "refinement": 20 + 2 * (9 + 9)}
    assert taken[-1][1] == pytest.approx(1e-3 * 4 / 240)  # one step of 4 images before the end of 240
    assert machine.epoch(machine.total_steps) == pytest.approx(3.0)


def test_a_stage_with_a_schedule_of_its_own_stands_outside_the_runs():
    own = {"lr": 2e-3, "warmup_steps": 2, "decay": "linear", "final_lr": 1e-3}
    taken = walk(manager(EARLY | {"epochs": 1}, STABLE | {"schedule": own}, {"name": "end", "steps": 10}))
    rates = {name: [lr for stage, lr in taken if stage == name] for name in ("early", "stable", "end")}
    assert rates["early"] + rates["end"] == pytest.approx([1e-3 * (1 - step / 20) for step in range(20)])
    assert rates["stable"] == pytest.approx([1e-3, 2e-3, 2e-3, 1.5e-3])


def test_a_stage_that_ends_early_lengthens_the_own_schedule_of_the_next():
    own = {"lr": 2e-3, "decay": "linear"}
    taken = walk(manager(THREE[0] | {"schedule": own}, {"name": "stable", "steps": 4, "schedule": own}), [0.5])
    assert [lr for name, lr in taken if name == "stable"] == pytest.approx([2e-3 * (1 - step / 13) for step in range(13)])


def test_a_finished_run_goes_on_where_a_branch_adds_a_stage_with_its_own_schedule():
    short, step = manager(EARLY), 20
    walk(short)
    longer = manager(EARLY, STABLE | {"schedule": {"lr": 1e-4}})
    longer.load_state(short.state(), step)
    assert (longer.stage.name, longer.start, longer.total_steps, longer.learning_rate(step)) == ("stable", 20, 24, 1e-4)


def test_a_branch_whose_later_stages_would_have_changed_the_learning_rate_of_what_was_trained_is_refused():
    saved = manager(EARLY, STABLE)
    saved.finish_step(20, float)
    with pytest.raises(ConfigError, match=r"\[0, 224\] images, the checkpoint's \[0, 192\], and it has begun"):
        manager(EARLY, STABLE | {"steps": 8}).load_state(saved.state(), 20)
    manager(EARLY, STABLE | {"centers": "epl"}).load_state(saved.state(), 20)


def test_a_run_in_which_every_stage_has_its_own_schedule_needs_none():
    own = {"schedule": {"lr": 2e-3, "warmup_steps": 1}}
    rates = [lr for _, lr in walk(manager(EARLY | own, STABLE | own, schedule={"warmup_epochs": 9}))]
    assert (len(rates), max(rates)) == (24, 2e-3)


def test_the_measure_is_smoothed_looked_at_now_and_then_and_begins_with_the_stage():
    smooth = [stage | {"until": until(0.4, smoothing=0.5, check_every=3)} for stage in THREE[:2]]
    looked_at = []
    machine = manager(*smooth, THREE[2])
    taken = walk(machine, [0.9, 0.1, 0.1, 0.9, 0.9, 0.9, 0.1], lambda value: looked_at.append(float(value)) or float(value))
    first = (0.25 * 0.9 + 0.5 * 0.1 + 0.1) / 1.75
    # at 6: 0.9 three times; then the second stage begins with 0.1 and never gets there
    assert looked_at[:2] == pytest.approx([first, (first * 1.75 / 8 + 0.9 * 1.75) / (1.75 + 1.75 / 8)])
    assert looked_at[2:] == pytest.approx([0.1] * 4)
    assert names(taken) == {"alignment": 6, "stabilization": 14, "refinement": 10}


def test_a_skipped_step_measures_nothing():
    assert names(walk(manager(*THREE), [None, None, 0.9, None])) == {"alignment": 3, "stabilization": 17, "refinement": 10}


def test_what_rank_0_saw_decides_on_every_rank():
    assert names(walk(manager(*THREE), [0.9], agree=lambda value: 0.0)) == {"alignment": 10, "stabilization": 10, "refinement": 10}


@pytest.mark.parametrize("cut", range(30))
def test_a_manager_that_was_saved_at_any_step_goes_on_as_if_nothing_had_been(cut):
    squares = [0.1, 0.2, 0.15, 0.25, 0.3, 0.3, 0.2, 0.3, 0.4, 0.5, 0.6]
    stages = [stage | {"until": until(0.2, smoothing=0.9, check_every=2)} for stage in THREE[:2]] + [THREE[2]]
    whole, machine, taken, step = walk(manager(*stages), squares), manager(*stages), [], 0
    while step < machine.total_steps:
        if step == cut:
            saved, machine = json.loads(json.dumps(machine.state())), manager(*stages)
            machine.load_state(saved, step)
        taken.append((machine.stage.name, machine.learning_rate(step)))
        step += 1
        machine.observe(torch.tensor(squares[min(step, len(squares)) - 1]))
        machine.finish_step(step, float)
    assert taken == whole
    assert len(names(taken)) == 3


def test_images_left_and_epochs_follow_the_stages():
    machine = manager(THREE[0], THREE[1], THREE[2] | {"batch": {"micro_batch_size": 2}})
    assert (machine.images_left(0), machine.epoch(0)) == (240, 0.0)
    machine.observe(torch.tensor(0.9))
    machine.finish_step(1, float)
    assert (machine.images_left(1), machine.epoch(1)) == (232, 0.1)
    assert (machine.start, machine.stop) == (1, 20)


@pytest.mark.parametrize(
    ("stages", "sections", "images", "expected"),
    [
        ([EARLY], {"batch": {"micro_batch_size": 4, "grad_accum_steps": 8}}, 63,
         r"stages.0: 63 images do not fill one global batch of 64 \(4 x 8 on each of 2 ranks\)"),
        ([EARLY], {}, 7, r"stages.0: 7 images do not fill one global batch of 8 \(4 x 1 on each of 2 ranks\)"),
        ([{"name": "a", "steps": 4}], {"schedule": {"warmup_epochs": 9}}, 80, r"schedule: a warm-up of 90 steps of 8 images is longer"),
        ([EARLY], {"batch": {"micro_batch_size": 4, "global_batch_size": 12}}, 80,
         r"batch.global_batch_size: 12 is no multiple of micro_batch_size x world_size = 4 x 2; batch.micro_batch_size=3 would do"),
        ([THREE[0] | {"until": until(0.2, check_every=10)}, THREE[2]], {}, 80, r"stages.0.until.check_every: 10 steps, but the stage ends"),
        ([EARLY, STABLE | {"batch": {"micro_batch_size": 4, "global_batch_size": 12}}], {}, 80,
         r"stages.1.batch.global_batch_size: 12 .*; stages.1.batch.micro_batch_size=3 would do"),
        ([EARLY, STABLE | {"schedule": {"lr": 1e-3, "warmup_epochs": 1}}], {}, 80, r"stages.1.schedule: a warm-up of 10 steps"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_walked_are_refused_with_the_numbers(stages, sections, images, expected):
    with pytest.raises(ConfigError, match=expected):
        manager(*stages, num_images=images, **sections)


def test_a_smoothed_mean_weights_the_past_and_starts_with_its_first_value():
    mean = SmoothedMean(recipe(*[THREE[0] | {"until": until(0.2, smoothing=0.75)}, THREE[2]]).stages[0].until)
    assert math.isnan(mean.value())
    for value in (4.0, 8.0):
        mean.add(torch.tensor(value))
    assert float(mean.value()) == pytest.approx((0.75 * 4 + 8) / 1.75)


def test_a_value_that_is_not_finite_leaves_a_smoothed_mean_alone():
    mean = SmoothedMean(recipe(*[THREE[0] | {"until": until(0.2, smoothing=0.75)}, THREE[2]]).stages[0].until)
    for value in (math.nan, 4.0, math.inf):
        mean.add(torch.tensor(value))
    assert float(mean.value()) == 4.0


def test_stage_losses_are_means_of_the_first_and_last_steps_and_survive_a_checkpoint():
    losses = StageLosses(window=2)
    for value in (5.0, 3.0, 2.0, 1.0):
        losses.record("early", torch.tensor(value))
    resumed = StageLosses(window=2)
    resumed.load_state(json.loads(json.dumps(losses.state())))
    resumed.record("early", torch.tensor(0.0))
    for value in (9.0, 8.0, 7.0):
        resumed.record("stable", torch.tensor(value))
    assert resumed.summary() == {"early": (4.0, 0.5), "stable": (9.0, 7.0)}
    assert losses.summary() == {"early": (4.0, 1.5)}
