"""What a checkpoint compares before a run goes on from it."""

import json

from train.checkpoint import Identity, Layout


def test_differences_name_the_nested_key_and_both_values():
    mine = Identity("fp32", {"optimizer": {"lr": 0.1}, "stages": [{"name": "a"}]}, {})
    saved = json.loads(json.dumps(vars(Identity("bf16", {"optimizer": {"lr": 0.2}, "stages": [{"name": "a"}]}, {}))))
    assert mine.differences(saved) == [
        "precision: this run has fp32, the checkpoint bf16",
        "recipe.optimizer.lr: this run has 0.1, the checkpoint 0.2",
    ]
    assert mine.differences(json.loads(json.dumps(vars(mine)))) == []


def test_another_layout_is_told():
    layout = Layout(2, 1, [8, 4])
    assert layout.change({"world_size": 2, "zero_stage": 1, "micro_batch_sizes": [8, 4]}) is None
    assert layout.change({"world_size": 4, "zero_stage": 3, "micro_batch_sizes": [4, 2]}) == "4 ranks, ZeRO 3, micro-batches of 4, 2"
