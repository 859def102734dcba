"""What a recipe comes to on a number of ranks, against numbers worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.record_sets import field_records, write_records
from train.config import ConfigError, load_run_config
from train.plan import compare, count_images, describe, main, plan_run, written_for

ROOT = Path(__file__).resolve().parents[2]
WEBFACE = 42_474_557
# 42,474,557 // (64 x 384) = 1,728 and 42,474,557 // (8 x 384) = 13,826 steps an epoch.
AT_64 = {"early": 40 * 1_728, "stable": 60 * 1_728}
AT_8 = {"early": 40 * 13_826, "stable": 60 * 13_826}


def recipe(name: str = "lvface_v1", *overrides: str):
    return load_run_config(ROOT / f"train/recipes/{name}.yaml", overrides)


def steps(plan) -> dict[str, int]:
    return {stage.name: stage.steps for stage in plan.stages}


def test_a_plan_counts_steps_as_the_loader_counts_batches():
    plan = plan_run(recipe(), WEBFACE, 64)
    assert steps(plan) == AT_64 == {"early": 69_120, "stable": 103_680}
    assert plan.total_steps == 172_800
    assert plan.total_images == 172_800 * 24_576
    (curve,) = plan.curves
    assert (curve.key, curve.lr, curve.warmup_steps, curve.steps) == ("optimizer.lr", 1e-3, 4 * 1_728, 172_800)
    early, stable = plan.stages
    assert (early.micro_batch_size, early.grad_accum_steps, early.global_batch_size) == (384, 1, 24_576)
    assert (early.epochs, early.until, early.sample_rate, early.centers) == (40, None, 0.3, "learned")
    assert (stable.sample_rate, stable.centers, stable.margin) == (1.0, "pco", "unified m1 1 m2 0.5 m3 0")


def test_stages_of_different_batches_are_counted_each_by_its_own():
    plan = plan_run(recipe("lvface_pco"), WEBFACE, 64)
    # (42,474,557 // 64) // 128 = 5,184
    assert steps(plan) == {"alignment": 30 * 1_728, "stabilization": 30 * 1_728, "refinement": 60 * 5_184}
    assert [stage.until for stage in plan.stages] == [0.2, 0.35, None]
    assert plan.total_images == 60 * 1_728 * 24_576 + 60 * 5_184 * 8_192
    assert plan.curves[0].warmup_steps == 4 * 1_728


def test_a_stage_with_a_schedule_of_its_own_has_a_curve_of_its_own():
    own = "stages.1.schedule={lr: 5e-4, warmup_steps: 7, final_lr: 1e-5}"
    shared, stable = plan_run(recipe("lvface_v1", own), WEBFACE, 64).curves
    assert (shared.key, shared.steps) == ("optimizer.lr", 69_120)
    assert (stable.key, stable.lr, stable.warmup_steps, stable.steps) == ("stages.1.schedule.lr", 5e-4, 7, 103_680)


def test_on_fewer_ranks_the_recipe_s_global_batch_is_kept_by_accumulating():
    kept = compare(recipe(), WEBFACE, 8, 64).global_batch
    assert kept.overrides == ()
    assert [(stage.grad_accum_steps, stage.global_batch_size) for stage in kept.plan.stages] == [(8, 24_576)] * 2
    assert steps(kept.plan) == AT_64 == {"early": 69_120, "stable": 103_680}
    assert (kept.plan.curves[0].lr, kept.plan.curves[0].warmup_steps) == (1e-3, 6_912)  # 4 x 1,728


def test_a_kept_accumulation_divides_the_batch_multiplies_the_steps_and_scales_the_learning_rate_by_rule():
    comparison = compare(recipe(), WEBFACE, 8, 64)
    for variant, lr in ((comparison.square_root, 0.000353553), (comparison.linear, 0.000125)):  # 1e-3 / sqrt(8), 1e-3 / 8
        assert variant.overrides == ("batch.global_batch_size=3072", f"optimizer.lr={lr:g}")
        assert [(stage.grad_accum_steps, stage.global_batch_size) for stage in variant.plan.stages] == [(1, 3_072)] * 2
        assert steps(variant.plan) == AT_8
        assert (variant.plan.curves[0].lr, variant.plan.curves[0].warmup_steps) == (lr, 4 * 13_826)
    # 1 - (1 - 0.9) / 8, 1 - (1 - 0.999) / 8, 1e-8 x sqrt(8)
    assert comparison.square_root.note.endswith("'optimizer.betas=[0.9875, 0.999875]' optimizer.eps=2.83e-08")
    assert steps(comparison.reference) == AT_64


@pytest.mark.parametrize(
    ("name", "overrides", "world_size", "reference"),
    [
        ("lvface_v1", [], 8, 64),
        ("lvface_pco", [], 8, 64),
        ("lvface_pco", ["stages.1.until=null", "stages.2.schedule={lr: 1e-4, final_lr: 1e-6, warmup_steps: 80}"], 16, 64),
        ("demo", ["data.num_images=4800", "stages.0.steps=30", "stages.0.epochs=null"], 2, 8),
        ("demo", ["data.num_images=4800"], 8, 2),
    ],
)
def test_pasted_overrides_give_the_plan_that_was_announced(name, overrides, world_size, reference):
    cfg = recipe(name, *overrides)
    comparison = compare(cfg, cfg.data.num_images, world_size, reference)
    for variant in filter(None, (comparison.global_batch, comparison.square_root, comparison.linear)):
        pasted = recipe(name, *overrides, *variant.overrides)
        assert plan_run(pasted, cfg.data.num_images, world_size) == variant.plan
        ratio = 1 if variant is comparison.global_batch else world_size / reference
        for stage, written in zip(variant.plan.stages, comparison.reference.stages, strict=True):
            assert stage.global_batch_size == written.global_batch_size * ratio
            trained, planned = stage.steps * stage.global_batch_size, written.steps * written.global_batch_size
            # What does not fill a batch: less than one global batch of the larger run per epoch.
            assert abs(trained - planned) <= max(stage.global_batch_size, written.global_batch_size) * (stage.epochs or 1)


def test_a_recipe_with_accumulation_steps_says_which_to_add():
    comparison = compare(recipe("demo", "batch.grad_accum_steps=3"), 48_000, 2, 8)
    assert comparison.global_batch.overrides == ("batch.grad_accum_steps=12",)
    assert comparison.square_root.overrides == ("optimizer.lr=0.0005",)
    assert [stage.grad_accum_steps for stage in comparison.square_root.plan.stages] == [3, 3]


def test_steps_and_warm_up_given_in_steps_keep_their_images():
    fixed = ["stages.0.epochs=null", "stages.0.steps=100", "schedule.warmup_epochs=0", "schedule.warmup_steps=10", "schedule.final_lr=1e-5"]
    comparison = compare(recipe("demo", *fixed), 48_000, 2, 8)
    assert comparison.linear.overrides == (
        "stages.0.steps=400", "schedule.warmup_steps=40", "optimizer.lr=0.00025", "schedule.final_lr=2.5e-06"
    )  # fmt: skip
    assert comparison.global_batch.overrides == ("batch.grad_accum_steps=4",)


def test_more_ranks_than_the_global_batch_has_room_for_leave_the_accumulation_to_keep():
    comparison = compare(recipe("demo"), 4_800, 8, 2)
    assert comparison.global_batch is None
    assert "128 is no multiple of micro_batch_size x world_size = 64 x 8" in comparison.refusal
    assert comparison.square_root.overrides == ("optimizer.lr=0.002",)


def test_a_global_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"batch\.global_batch_size: 24576 is no multiple of micro_batch_size x world_size = 384 x 7"):
        plan_run(recipe(), WEBFACE, 7)


@pytest.mark.parametrize(
    ("name", "overrides", "ranks"),
    [
        ("lvface_v1", [], 64),
        ("lvface_pco", [], 64),
        ("lvface_v1_glint360k", [], 8),
        ("demo", [], None),
        ("lvface_pco", ["batch.micro_batch_size=192"], None),  # 128 ranks in its first stages, 64 in its last
        ("lvface_v1", ["batch.global_batch_size=1000"], None),
    ],
)
def test_a_recipe_is_written_for_the_ranks_that_need_no_accumulation(name, overrides, ranks):
    assert written_for(recipe(name, *overrides)) == ranks


def test_images_are_counted_in_the_records_where_the_recipe_does_not_say(tmp_path):
    write_records(tmp_path / "train.rec", field_records([4, 1, 5]))
    found = [f"data.path={tmp_path}"]
    assert count_images(recipe("demo", *found).data) == 10
    assert count_images(recipe("lfw_tiny", *found).data) == 9  # it leaves identities of one image out
    assert count_images(recipe("lfw_tiny", *found, "data.num_images=12").data) == 12


def plan(*arguments: str) -> int:
    name, *rest = arguments
    recipe_file = ["--config", str(ROOT / f"train/recipes/{name}.yaml"), "--deepspeed_config", str(ROOT / "ds_configs/zero1_bf16.json")]
    return main([*recipe_file, *rest])


def test_the_command_prints_both_ways_and_writes_them_as_json(tmp_path, capsys):
    assert plan("lvface_v1", "--world-size", "8", "--json", str(tmp_path / "plan.json")) == 0
    text = capsys.readouterr().out
    assert "ZeRO 1, bf16" in text
    assert "69,120" in text
    assert "\nA  nothing to add: the recipe as it is\n" in text
    assert "\nB  batch.global_batch_size=3072 optimizer.lr=0.000353553\n" in text
    assert "\nC  batch.global_batch_size=3072 optimizer.lr=0.000125\n" in text
    assert "arXiv:1706.02677" in text
    assert "arXiv:2205.10287" in text
    assert "24,576 as written and 3,072 on\n8 ranks" in text  # images in the head's loss
    said = json.loads((tmp_path / "plan.json").read_text())
    assert (said["total_steps"], said["zero_stage"], said["stages"][0]["steps"]) == (172_800, 1, 69_120)
    assert said["comparison"]["linear"]["plan"]["total_steps"] == 1_382_600


def test_another_global_batch_and_no_warm_up_are_warned_of(capsys):
    assert plan("demo", "--world-size", "2", "data.num_images=4800", "--reference", "2") == 0
    assert "warning" not in capsys.readouterr().out
    assert plan("demo", "--world-size", "4", "data.num_images=4800", "--reference", "2", "schedule.warmup_epochs=0") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said[0] == "warning: optimizer.lr: no warm-up, and AdamW's first steps are its largest: set schedule.warmup_epochs"
    assert [line.split(" where ")[0] for line in said[1:]] == [
        "warning: stage early: a global batch of 256", "warning: stage stable: a global batch of 256",
    ]  # fmt: skip


def test_the_command_compares_with_nothing_where_there_is_nothing_to_compare(capsys):
    assert plan("lvface_v1", "--world-size", "64") == 0
    text = capsys.readouterr().out
    assert "This is the number of ranks that the recipe was written for." in text
    assert "accumulation: " not in text
    assert plan("demo", "--world-size", "2", "data.num_images=4800") == 0
    assert "--reference N says how many ranks it was written for" in capsys.readouterr().out
    assert plan("demo", "--world-size", "2", "data.num_images=4800", "--reference", "4") == 0
    assert "\nA  batch.grad_accum_steps=2\nB  optimizer.lr=0.000707107\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lvface_v1", "--world-size", "7"], "batch.global_batch_size: 24576 is no multiple of micro_batch_size x world_size = 384 x 7"),
        (["lvface_v1", "--world-size", "8", "head.sclae=1"], "head.sclae: unknown key; did you mean scale? (command line)"),
        (["demo", "--world-size", "2", "data.path=none"], "none: expected a folder with a set of shards or a .rec file, found nothing"),
        (["demo", "--world-size", "2", "data.num_images=100"], "stages.0: 100 images do not fill one global batch"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, expected):
    assert plan(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")


def test_plan_is_a_command_of_train_beside_the_training_itself():
    def train(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "train", *arguments], cwd=ROOT, capture_output=True, text=True)

    assert "--world-size" in train("plan", "--help").stdout
    assert "python -m train plan" in train("--help").stdout
    files = ["--config", "train/recipes/lvface_v1.yaml", "--deepspeed_config", "ds_configs/zero1_bf16.json"]
    done = train("plan", *files, "--world-size", "7")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_plan_names_frozen_stages_and_needs_no_file_of_weights():
    frozen = ["model.init_from=nowhere.safetensors", "data.num_images=1000", "data.num_classes=50"]
    cfg = load_run_config(ROOT / "train/recipes/lfw_tiny_finetune.yaml", frozen)
    plan = plan_run(cfg, 1000, 2)
    assert [stage.freeze_backbone for stage in plan.stages] == [True, False]
    assert "backbone: frozen in stage head, where the class centers alone learn" in describe(plan)
    assert "class means, one pass of the backbone forward over 1,000 images" in describe(plan)
    random = load_run_config(ROOT / "train/recipes/lfw_tiny_finetune.yaml", [*frozen, "head.init_centers=random"])
    assert "class means" not in describe(plan_run(random, 1000, 2))
