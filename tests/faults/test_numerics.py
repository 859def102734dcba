"""Values that are not finite on one rank: no weight moves anywhere, and the run skips, stops or goes back, as the recipe says."""

import json
import math
import re

import pytest
import torch
import torch.distributed as dist

from tests.events import scalars
from tests.launch import errors
from tests.ranks import run_ranks
from tests.training import check_same_run, losses, train_on_rank, write_recipe
from train.config import GuardConfig
from train.dist import RankError, Ranks
from train.guard import Guard


def train_poisoned(group, recipe, poisoned, rank=1, overrides=()):
    """Train with an infinite pixel in each micro-batch of ``rank`` in the loader's steps ``poisoned``; returns the step or the error."""
    from data_pipeline.loader import FaceLoader

    following = FaceLoader.__next__

    def poison(self):
        batch = following(self)
        if group.rank() == rank and (batch.step - 1) // 2 + 1 in poisoned:  # two micro-batches a step
            batch.images[0, 0, 0, 0] = float("inf")
        return batch

    FaceLoader.__next__ = poison
    try:
        return train_on_rank(group, recipe, "zero1_fp32.json", overrides)
    except RankError as error:
        return str(error)


def said(output):
    return [json.loads(line) for line in (output / "skipped_steps.jsonl").read_text().splitlines()]


@pytest.mark.fault("infinite pixels for three steps, guard.then=rollback", "back to the checkpoint before, on with other images")
def test_a_run_goes_back_to_the_checkpoint_before_the_trouble_and_on_with_other_images(shards, tmp_path):
    """Checkpoints at steps 3, 4, 6; the images of steps 5 to 7 are bad, so step 8 follows on the state of step 4, as step 5."""
    metrics = {"port": 0, "log_every": 1, "tensorboard": True}
    guard = {"max_skipped": 3, "then": "rollback"}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", guard=guard, metrics=metrics)
    assert run_ranks(2, train_poisoned, recipe, [5, 6, 7]) == [8, 8]
    skipped = said(tmp_path / "run")
    assert [(line["step"], line["ranks"]) for line in skipped] == [(5, [1]), (6, [1]), (7, [1])]
    assert all(name.startswith("shard_") or "/" in name for line in skipped for name in line["records"]["1"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    assert [line["outcomes"]["applied"] for line in lines] == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert sum(line["outcomes"]["loss_not_finite"] + line["outcomes"]["gradient_not_finite"] for line in lines) == 3
    assert [line["furthest_step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 8]
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert kept == [3, 4, 6, 8]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())  # the last word on each step
    assert list(scalars(tmp_path / "run/tensorboard")["lvface_step"]) == list(range(1, 9))  # that alone


@pytest.mark.fault("infinite pixels for ever, guard.then=rollback", "stopped after max_rollbacks, rank named")
def test_rollbacks_come_to_an_end(shards, tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards, tmp_path / "run", guard={"max_skipped": 2, "then": "rollback", "max_rollbacks": 2}
    )
    for answer in run_ranks(2, train_poisoned, recipe, list(range(5, 99))):
        assert "2 rollbacks have not helped" in answer
        assert "on rank 1" in answer


@pytest.mark.fault("infinite pixels before any checkpoint", "stopped")
def test_without_a_checkpoint_before_the_trouble_the_run_stops(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", guard={"max_skipped": 2, "then": "rollback"})
    for answer in run_ranks(2, train_poisoned, recipe, [1, 2]):
        assert "no checkpoint from before step 1 to roll back to" in answer


@pytest.mark.fault("infinite pixels on rank 0", "stopped after max_skipped; step, rank and records named")
def test_a_run_that_may_not_go_back_stops_and_names_rank_and_records(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", guard={"max_skipped": 2})
    for answer in run_ranks(2, train_poisoned, recipe, [5, 6], 0):
        assert "steps 5 to 6 were all skipped" in answer
        assert "on rank 0" in answer
    assert {line["step"]: line["ranks"] for line in said(tmp_path / "run")} == {5: [0], 6: [0]}


@pytest.mark.slow
@pytest.mark.fault("a bit of a weight flips on rank 1", "found at the next check; step, ranks and parameter named")
def test_a_flipped_bit_stops_the_run_and_it_goes_on_from_the_checkpoint_before(scene, finished):
    """ZeRO's weights are whole on every rank until the step that gathers them anew; two calls a step."""
    changes = {"guard": {"replica_check_steps": 6}}
    scene.start({"rank": 1, "place": "replicas", "call": 12, "fault": "flip_a_bit"}, **changes)
    result = scene.end()
    (error,) = errors(result)
    assert re.search(r"step 6: rank 0 on \S+, rank 1 on \S+: different values of pos_embed, and no majority .* Start again", error)
    assert scene.codes() == {0: 2, 1: 2}
    assert list(losses(scene.output)) == [1, 2, 3, 4, 5]
    assert scene.finish(**changes).returncode == 0
    check_same_run(scene.output, finished())


def spend_the_loss_scale(group, folder):
    """A run under fp16 whose every step overflows, as the guard sees it: no backbone on a CPU computes in fp16."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    guard = Guard(GuardConfig(max_skipped=3), Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group), folder, "fp16")
    guard.enter_stage("only")
    for step in range(1, 9):
        guard.watch(torch.tensor(9.0), list)
        try:
            guard.after_step(step, torch.tensor(9.0), applied=False, not_finite_ranks=list)
        except RankError as error:
            return step, str(error)
    return step, "nothing"


@pytest.mark.fault("fp16 overflows in every step", "stopped after max_skipped, with advice")
def test_overflows_of_fp16_without_end_stop_the_run_with_advice(tmp_path):
    for step, said in run_ranks(2, spend_the_loss_scale, tmp_path):
        assert step == 3
        assert "steps 1 to 3 were all skipped: fp16 overflow (3 x)" in said
        assert "bf16 in place of fp16" in said
