"""What a checkpoint compares before a run goes on from it."""

import json

from train.checkpoint import Identity, Layout


def test_differences_name_the_nested_key_and_both_values():
    mine = Identity("fp32", {"optimizer": {"lr": 0.1}, "stages": [{"name": "a"}]}, {})
    saved = Identity("bf16", {"optimizer": {"lr": 0.2}, "stages": [{"name": "a"}]}, {}).saved()
    assert mine.differences(saved) == [
        "precision: this run has fp32, the checkpoint bf16",
        "recipe.optimizer.lr: this run has 0.1, the checkpoint 0.2",
    ]
    assert mine.differences(json.loads(json.dumps(mine.saved()))) == []


def identity(chosen, **stage):
    """Of a recipe whose ``rate`` is 0 and whose stage's ``margin`` is {"m": 0} at their defaults."""
    full = {"rate": 0, **chosen, "stages": [{"name": "a", **stage}]}
    return Identity("fp32", full, {}, {**chosen, "stages": [{"name": "a", **({} if stage.get("margin") == {"m": 0} else stage)}]})


def test_a_key_that_a_checkpoint_does_not_know_is_equal_at_its_default_alone():
    old = {"precision": "fp32", "recipe": {"stages": [{"name": "a"}]}, "deepspeed": {}}
    assert identity({}).differences(old) == []
    assert identity({}, margin={"m": 0}).differences(old) == []
    assert identity({"rate": 2}).differences(old) == ["recipe.rate: this run has 2, the checkpoint None"]
    assert identity({}, margin={"m": 1}).differences(old) == ["recipe.stages.0.margin.m: this run has 1, the checkpoint None"]


def test_a_section_that_a_checkpoint_had_switched_off_differs_from_one_of_defaults():
    off = {"precision": "fp32", "recipe": {"rate": 0, "stages": [{"name": "a", "margin": None}]}, "deepspeed": {}}
    assert identity({}, margin={"m": 0}).differences(off) == ["recipe.stages.0.margin.m: this run has 0, the checkpoint None"]


def test_another_layout_is_told():
    layout = Layout(2, 1, [8, 4])
    assert layout.change({"world_size": 2, "zero_stage": 1, "micro_batch_sizes": [8, 4]}) is None
    assert layout.change({"world_size": 4, "zero_stage": 3, "micro_batch_sizes": [4, 2]}) == "4 ranks, ZeRO 3, micro-batches of 4, 2"
