import json

import pytest
import torch

from model.partial_fc import PartialFC
from train.config import ConfigError, StageConfig
from train.stages import StageLosses, StageManager

EARLY = StageConfig(name="early", epochs=2, sample_rate=0.5, update_expectation=True)
STABLE = StageConfig(name="stable", steps=4, centers="pco")


def test_epochs_become_optimizer_steps_and_stages_follow_each_other():
    manager = StageManager([EARLY, STABLE], micro_batches_per_epoch=7, grad_accum_steps=2)
    assert [(stage.name, stage.start, stage.stop) for stage in manager.stages] == [("early", 0, 7), ("stable", 7, 11)]
    assert manager.total_steps == 11
    assert [manager.at(step).name for step in range(11)] == ["early"] * 7 + ["stable"] * 4


def test_the_head_is_switched_at_the_first_step_of_a_stage_and_only_there():
    head, manager = PartialFC(4, 8), StageManager([EARLY, STABLE], 2, 1)
    entered = {}
    for step in range(manager.total_steps):
        stage = manager.enter(step, head)
        if stage:
            entered[step] = (stage.name, head.sample_rate, head.centers, head.update_expectation)
    assert entered == {0: ("early", 0.5, "learned", True), 4: ("stable", 1.0, "pco", False)}


def test_a_resumed_manager_sets_the_head_to_the_stage_it_is_in():
    head = PartialFC(4, 8)
    assert StageManager([EARLY, STABLE], 2, 1).enter(6, head).name == "stable"
    assert head.centers == "pco"


def test_a_stage_shorter_than_one_step_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"stages.0.epochs: 2 epochs of 1 micro-batches .* batch.grad_accum_steps = 8"):
        StageManager([EARLY], micro_batches_per_epoch=1, grad_accum_steps=8)


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
