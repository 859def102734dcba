"""A killed run goes on as if nothing had happened, and a damaged checkpoint is passed over or refused, never half used."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.partial_fc import PartialFC
from tests.ranks import run_ranks
from tests.training import check_same_run, final_state, images_read, losses, recipe_for, train_on_rank, write_recipe
from train.dist import RankError, Ranks

# Checkpoints stand at steps 3, 4 (stage end), 6 and 8; an epoch is 3 steps. Killed: in the early stage before any checkpoint; one step
# before and after the stage switch; in the second half; between two micro-batches; while saving at the stage switch.
KILLS = [(1, 2), (0, 3), (1, 5), (0, 7), (1, "within", 6), (0, "save", 2)]
SLOW_KILLS = [(1, 2), (1, 5), (0, 7)]


def kills(all_, slow):
    """As parameters; the ``slow`` ones are for `make faults`."""

    def text(rank, *when):
        return f"rank {rank} {'after step' if isinstance(when[0], int) else f'{when[0]} step'} {when[-1]}".replace("save step", "in save")

    return pytest.mark.parametrize(
        "kill", [pytest.param(kill, marks=pytest.mark.slow if kill in slow else (), id=text(*kill)) for kill in all_]
    )


@pytest.mark.fault("SIGKILL of {id}", "continued bit for bit")
@kills(KILLS, SLOW_KILLS)
def test_a_killed_run_continues_bit_for_bit(kill, shards, finished, tmp_path):
    check_resume(finished(), shards, tmp_path, "zero1_fp32.json", kill)


@pytest.mark.fault("SIGKILL of a rank within a step, under {id}", "continued bit for bit")
@pytest.mark.parametrize(
    "ds_config", ["zero3_bf16.json", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3_fp32.json", "zero1_bf16.json"))]
)  # zero2_fp32: SWITCHES, below
def test_every_zero_stage_and_precision_resumes_bit_for_bit(ds_config, shards, finished, tmp_path):
    check_resume(finished(ds_config), shards, tmp_path, ds_config, (1, "within", 5))


def layouts():
    """World size, ZeRO stage, and when a rank is killed; all but one are for `make faults`."""
    for world_size in (1, 4):
        for stage in (1, 2, 3):
            for when in ("within a step", "in a save"):
                fast = (world_size, stage, when) == (1, 1, "in a save")
                marks = () if fast else pytest.mark.slow
                yield pytest.param(world_size, stage, when, marks=marks, id=f"{when}, world size {world_size}, ZeRO {stage}")


@pytest.mark.fault("SIGKILL within a step and in a save, 1 and 4 ranks, ZeRO 1, 2 and 3", "continued bit for bit")
@pytest.mark.parametrize(("world_size", "stage", "when"), layouts())
def test_one_rank_and_four_continue_bit_for_bit(world_size, stage, when, shards, finished, tmp_path):
    """In the middle of an epoch, by the last rank; or by the first at the switch of stages."""
    ds_config = f"zero{stage}_fp32.json"
    kill = (world_size - 1, "within", 5) if when == "within a step" else (0, "save", 2)
    check_resume(finished(ds_config, world_size), shards, tmp_path, ds_config, kill, world_size)


# A threshold ends the first stage a step early, at 2; the second takes 1 more and ends at 5; the third has another batch, margin and
# learning rate. A checkpoint follows every step. Killed: one step before each switch, before and in its save, and one step after.
SWITCHES = {
    "stages": [
        {
            "name": "alignment",
            "steps": 3,
            "sample_rate": 0.5,
            "update_expectation": True,
            "until": {"target_cosine_square": 1e-6, "smoothing": 0.5, "check_every": 2},
        },
        {"name": "stabilization", "steps": 2, "centers": "vpl", "margin": {"m3": 0.2}},
        {
            "name": "refinement",
            "steps": 3,
            "centers": "pco",
            "margin": {"kind": "adaface"},
            "batch": {"micro_batch_size": 4, "grad_accum_steps": 3},
            "schedule": {"lr": 5e-4, "warmup_steps": 1},
        },
    ],
    "checkpoint": {"every_steps": 1, "keep_last": 9},
}


@pytest.fixture(scope="module")
def switched(shards, tmp_path_factory):
    """Output of an uninterrupted run through SWITCHES."""
    folder = tmp_path_factory.mktemp("switched")
    recipe = write_recipe(folder / "recipe.yaml", shards, folder / "run", **SWITCHES)
    assert run_ranks(2, train_on_rank, recipe, "zero2_fp32.json") == [8, 8]
    return folder / "run"


def test_stages_switch_at_the_step_that_their_thresholds_and_lengths_say(switched):
    lines = list(map(json.loads, (switched / "metrics.jsonl").read_text().splitlines()))
    assert [line["stage_name"] for line in lines] == ["alignment"] * 2 + ["stabilization"] * 3 + ["refinement"] * 3
    assert [line["images"] for line in lines] == [32] * 5 + [24] * 3
    assert [line["learning_rate"] for line in lines[5:]] == pytest.approx([5e-4, 5e-4, 2.5e-4])
    assert lines[1]["target_cosine_smoothed"] >= 1e-6
    stages = [json.loads((switched / f"checkpoints/step_0000000{step}/manifest.json").read_text())["run"]["stage"] for step in (1, 2, 5, 8)]
    assert stages == ["alignment", "stabilization", "refinement", "refinement"]


SWITCH_KILLS = [(0, 2), (0, "save", 2), (0, 3), (1, 5), (0, "save", 5), (1, "within", 6)]


@pytest.mark.fault("SIGKILL of {id}; stages of other batches begin after steps 2 and 5", "continued bit for bit")
@kills(SWITCH_KILLS, [(0, 2), (0, 3), (1, 5)])
def test_a_run_killed_around_a_switch_continues_bit_for_bit(kill, shards, switched, tmp_path):
    check_resume(switched, shards, tmp_path, "zero2_fp32.json", kill, **SWITCHES)


def check_resume(expected, shards, tmp_path, ds_config, kill, world_size=2, **changes):
    """Killed and started again, a run ends as the one at ``expected`` did."""
    output = tmp_path / "run"
    recipe = recipe_for(world_size, tmp_path / "recipe.yaml", shards, output, **changes)
    with pytest.raises(AssertionError, match=r"ranks ended without a traceback|failed"):
        run_ranks(world_size, train_on_rank, recipe, ds_config, (), kill)
    assert run_ranks(world_size, train_on_rank, recipe, ds_config) == [8] * world_size
    assert not list(output.glob("checkpoints/*.partial*"))
    check_same_run(output, expected, world_size)
    for rank in range(world_size):
        assert images_read(output, rank) == images_read(expected, rank)


@pytest.mark.slow
def test_a_log_window_that_the_kill_cut_in_two_is_logged_whole(shards, tmp_path):
    """Checkpoint at step 6, log lines at 5 and 8."""
    outputs = [tmp_path / "whole", tmp_path / "killed"]
    recipes = [write_recipe(tmp_path / f"{out.name}.yaml", shards, out, metrics={"port": 0, "log_every": 5}) for out in outputs]
    run_ranks(2, train_on_rank, recipes[0], "zero1_fp32.json")
    with pytest.raises(AssertionError):
        run_ranks(2, train_on_rank, recipes[1], "zero1_fp32.json", (), (0, 7))
    run_ranks(2, train_on_rank, recipes[1], "zero1_fp32.json")
    whole, killed = map(losses, outputs)
    assert list(whole) == [5, 8]
    assert killed == whole


def copy_of(finished, tmp_path, ds_config="zero1_fp32.json"):
    output = tmp_path / "run"
    shutil.copytree(finished(ds_config), output)
    return output


def resumed_from(group, recipe, ds_config, overrides):
    """(step of the checkpoint, what was said) or the error's text."""
    from train.checkpoint import Checkpoints

    steps = []
    original = Checkpoints.read
    Checkpoints.read = lambda self, folder, **options: steps.append(folder.name) or original(self, folder, **options)
    try:
        train_on_rank(group, recipe, ds_config, overrides)
    except RankError as error:
        return str(error)
    return steps[0] if steps else None


def resumed_and_said(group, recipe, ds_config):
    """What resumed_from returns, and all that this rank had to say."""
    said, say = [], Ranks.say
    Ranks.say = lambda self, text: (said.append(text), say(self, text))
    return resumed_from(group, recipe, ds_config, ()), said


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path):
    """With the other rank's file, which is as good but for its place."""
    other, aside = path.with_name("rank_00000.pt"), path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


DAMAGES = {
    "a bit changed": (flip_a_bit, "the SHA-256 of rank_00001.pt is not the manifest's: its content has changed"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 1), r"rank_00001.pt has \d+ bytes, the manifest says \d+"),
    "removed": (Path.unlink, "rank_00001.pt is missing"),
    "exchanged with another rank's": (exchange, r"rank_0000\d.pt (has|is not)|the SHA-256 of rank_0000\d.pt is not the manifest's"),
}


@pytest.mark.fault("a rank's file of the newest checkpoint {id}", "named; the checkpoint before is used")
@pytest.mark.parametrize("damage", [pytest.param(name, marks=() if name == "a bit changed" else pytest.mark.slow) for name in DAMAGES])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(damage, shards, finished, tmp_path):
    output = copy_of(finished, tmp_path)
    action, expected = DAMAGES[damage]
    action(output / "checkpoints/step_00000008/rank_00001.pt")
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, output)
    (step, said), (other_step, _) = run_ranks(2, resumed_and_said, recipe, "zero1_fp32.json")
    assert step == other_step == "step_00000006"
    assert re.search(f"passing over checkpoint {output}/checkpoints/step_00000008: {expected}", "\n".join(said))
    assert losses(output) == losses(finished())


@pytest.mark.fault("the pointer `latest` left behind by a kill", "set right; the newest complete checkpoint is used")
def test_a_pointer_that_a_kill_left_behind_is_set_right(shards, finished, tmp_path):
    output = copy_of(finished, tmp_path)
    (output / "checkpoints/latest").write_text("step_00000006\n")
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, output)
    assert run_ranks(2, resumed_from, recipe, "zero1_fp32.json", ()) == ["step_00000008"] * 2
    assert (output / "checkpoints/latest").read_text() == "step_00000008\n"


@pytest.mark.fault("every manifest lost", "refused; no new start")
def test_a_run_whose_checkpoints_are_all_damaged_stops_instead_of_starting_again(shards, finished, tmp_path):
    output = copy_of(finished, tmp_path)
    for manifest in output.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, output)
    for answer in run_ranks(2, resumed_from, recipe, "zero1_fp32.json", ()):
        assert "no checkpoint here is complete (4 passed over" in answer


@pytest.mark.fault("a checkpoint of another run, or where none should be", "refused with both values")
@pytest.mark.parametrize(
    ("overrides", "ds_config", "expected"),
    [
        (["optimizer.lr=0.5"], "zero1_fp32.json", "recipe.optimizer.lr: this run has 0.5, the checkpoint 0.001"),
        ([], "zero1_bf16.json", "precision: this run has bf16, the checkpoint fp32"),
        (["resume=never"], "zero1_fp32.json", "this output has a checkpoint, and resume=never"),
        (["resume=required", "output={empty}"], "zero1_fp32.json", "no checkpoint to resume from, and resume=required"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(overrides, ds_config, expected, shards, finished, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, finished())
    overrides = [override.format(empty=tmp_path / "empty") for override in overrides]
    for answer in run_ranks(2, resumed_from, recipe, ds_config, overrides):
        assert expected in answer


def branch_at_the_switch(finished, tmp_path):
    """A copy of a finished run in which nothing after the first stage was saved."""
    output = copy_of(finished, tmp_path)
    for step in (6, 8):
        shutil.rmtree(output / f"checkpoints/step_0000000{step}")
    return output


@pytest.mark.slow
def test_a_run_that_branches_off_equals_one_that_had_the_other_stage_from_the_start(shards, finished, tmp_path):
    output = branch_at_the_switch(finished, tmp_path)
    other = ["stages.1.centers=epl", "stages.1.margin={kind: adaface}", "stages.1.sample_rate=0.7"]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, output)
    assert run_ranks(2, resumed_from, recipe, "zero1_fp32.json", [*other, "resume=branch"]) == ["step_00000004"] * 2
    whole = write_recipe(tmp_path / "whole.yaml", shards, tmp_path / "whole")
    assert run_ranks(2, train_on_rank, whole, "zero1_fp32.json", other) == [8, 8]
    assert losses(output) == losses(tmp_path / "whole") != losses(finished())
    for rank in range(2):
        mine, theirs = final_state(output, rank), final_state(tmp_path / "whole", rank)
        assert not [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])]


def test_a_branch_keeps_what_the_stage_before_it_left(shards, switched, tmp_path):
    """VPL's memory and the loader of the second stage, which the third of the first run did not want."""
    shutil.copytree(switched, tmp_path / "run")
    for step in (6, 7, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_0000000{step}")
    other = ["stages.2.centers=vpl", "stages.2.batch=null", "stages.2.margin=null"]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", **SWITCHES)
    assert run_ranks(2, resumed_from, recipe, "zero2_fp32.json", [*other, "resume=branch"]) == ["step_00000005"] * 2
    whole = write_recipe(tmp_path / "whole.yaml", shards, tmp_path / "whole", **SWITCHES)
    assert run_ranks(2, train_on_rank, whole, "zero2_fp32.json", other) == [8, 8]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") != losses(switched)


@pytest.mark.slow
def test_a_branch_may_begin_a_stage_of_another_batch_which_reads_the_data_anew(shards, finished, tmp_path):
    """The learning rate's curve counts images: 8 steps of 16 are as many as 4 of 32."""
    other = ["stages.1.batch={micro_batch_size: 4, grad_accum_steps: 2}", "stages.1.steps=8"]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, branch_at_the_switch(finished, tmp_path))
    assert run_ranks(2, train_on_rank, recipe, "zero1_fp32.json", [*other, "resume=branch"]) == [12, 12]
    whole = write_recipe(tmp_path / "whole.yaml", shards, tmp_path / "whole")
    assert run_ranks(2, train_on_rank, whole, "zero1_fp32.json", other) == [12, 12]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.1.steps=8", "resume=branch"], "stages: their learning-rate curve has warm-up and length of [64, 384] images"),
        (
            ["stages=[{name: early, steps: 4, sample_rate: 0.5, update_expectation: true}]", "resume=branch"],
            "the stages of this run end before",
        ),
        (["stages.1.centers=epl"], "recipe.stages.1.centers: this run has epl, the checkpoint pco"),
        (["stages.0.sample_rate=0.4", "resume=branch"], "recipe.stages.0.sample_rate: this run has 0.4, the checkpoint 0.5"),
        (["optimizer.lr=0.5", "resume=branch"], "recipe.optimizer.lr: this run has 0.5, the checkpoint 0.001"),
    ],
)
def test_only_stages_that_have_not_begun_may_differ_and_only_in_a_branch(overrides, expected, shards, finished, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, branch_at_the_switch(finished, tmp_path))
    for answer in run_ranks(2, resumed_from, recipe, "zero1_fp32.json", overrides):
        assert expected in answer


@pytest.mark.fault("another global batch", "refused with both values")
def test_another_global_batch_is_refused_with_both_values(shards, finished, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, finished())
    (answer,) = run_ranks(1, resumed_from, recipe, "zero1_fp32.json", ())
    assert "recipe.stages.0.batch.images: this run has 16, the checkpoint 32" in answer


def test_only_the_last_checkpoints_are_kept_and_the_pointer_names_the_newest(shards, tmp_path):
    output = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, output, checkpoint={"every_steps": 1, "keep_last": 2})
    run_ranks(2, train_on_rank, recipe, "zero1_fp32.json")
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["latest", "step_00000007", "step_00000008"]
    assert (output / "checkpoints/latest").read_text() == "step_00000008\n"
    manifest = json.loads((output / "checkpoints/step_00000008/manifest.json").read_text())
    assert {"backbone.safetensors", "rank_00000.pt", "rank_00001.pt"} <= manifest["files"].keys()
    assert manifest["run"]["stage"] == "stable"


def train_with_another_recipe_on_rank_1(group, recipe):
    overrides = ["optimizer.lr=0.5"] if dist.get_rank(group) == 1 else []
    with pytest.raises(RankError, match=r"the recipe of ranks \[1\] is not that of rank 0"):
        train_on_rank(group, recipe, "zero1_fp32.json", overrides)


@pytest.mark.fault("another recipe on rank 1", "refused before training")
def test_ranks_that_read_different_recipes_are_stopped_before_training(shards, tmp_path):
    run_ranks(2, train_with_another_recipe_on_rank_1, write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run"))


def train_with_centers_that_are_not_finite(group, recipe):
    initial = PartialFC.__init__

    def spoilt(self, *args, **kwargs):
        initial(self, *args, **kwargs)
        self.weight.fill_(float("nan"))

    PartialFC.__init__ = spoilt
    with pytest.raises(RankError, match="steps 1 to 3 were all skipped"):
        train_on_rank(group, recipe, "zero1_fp32.json", ["guard.max_skipped=3"])


@pytest.mark.fault("class centers not finite", "every step skipped; stopped with advice")
def test_a_run_that_skips_every_step_stops_and_names_the_steps(shards, tmp_path):
    run_ranks(2, train_with_centers_that_are_not_finite, write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run"))
