"""Estimates of speed and the table over all DeepSpeed configs, against what is worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.head_memory import HeadShape
from train.accelerators import ACCELERATORS
from train.budget import largest_micro_batch
from train.config import load_run_config
from train.ds_config import load_ds_config
from train.memory import Backbone, ZeroSettings, head_shape, stage_memory
from train.plan import main
from train.speed import stage_speed, step_traffic

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 2_059_906


def recipe(*overrides: str):
    return load_run_config(ROOT / "train/recipes/lvface_v1.yaml", overrides)


def zero_of(cfg, config="zero1_bf16", world_size=64) -> ZeroSettings:
    ds_config, summary = load_ds_config(ROOT / f"ds_configs/{config}.json", cfg, world_size, "cuda")
    return ZeroSettings.of(ds_config, summary.precision)


def test_a_rank_sends_what_rings_of_the_head_s_collectives_come_to():
    cfg = recipe()
    head = HeadShape(512, CLASSES, 64, 384, centers="pco")
    sent = step_traffic(Backbone.of(cfg), zero_of(cfg), head)
    B = 24_576
    # embeddings gathered and their gradients scattered [B, 512] float32, labels [B] int64
    assert sent.head_samples == 2 * (4 * B * 512) * 63 // 64 + 8 * B * 63 // 64
    # all-reduces: [2 anchors, 2, B] float64, and over all chunks [2 anchors, B] float32
    assert sent.head_sums == 2 * ((2 * 2 * 8 * B + 2 * 4 * B) * 63 // 64)
    assert sent.weights == 2 * 255_684_352 * 63 // 64


def speed(cfg, gpu="h100", precision="bf16", world_size=64, network=50e9, **changes):
    zero = zero_of(cfg, f"zero1_{precision}", world_size)
    head = replace(head_shape(cfg, zero, CLASSES, world_size, 0), **changes)
    return stage_speed(cfg, Backbone.of(cfg), zero, precision, head, ACCELERATORS[gpu], network)


def test_an_estimate_is_of_the_stated_parts():
    found = speed(recipe())
    assert found.step_s == found.products_s + found.memory_s + found.exposed_s
    assert found.images_per_second == pytest.approx(24_576 / found.step_s)
    assert found.flops == pytest.approx(found.utilisation * found.step_s * 989.4e12)
    assert found.exposed_s < found.network_s


def test_estimates_follow_what_they_are_of():
    base = speed(recipe())
    assert speed(recipe(), gpu="a100-80").step_s > base.step_s
    assert speed(recipe(), precision="fp32").step_s > base.step_s
    assert speed(recipe(), network=5e9).exposed_s > base.exposed_s
    assert speed(recipe("model.activation_checkpointing=false")).products_s < base.products_s
    assert speed(recipe("batch.global_batch_size=null"), world_size=1, network=5e9).network_s == 0.0


def test_the_largest_micro_batch_fits_and_the_next_one_does_not():
    cfg = recipe()
    zero, backbone, memory = zero_of(cfg), Backbone.of(cfg), 24 * 2**30
    size = largest_micro_batch(cfg, backbone, zero, CLASSES, 64, memory)

    def needed(b: int) -> int:
        return max(stage_memory(cfg, backbone, zero, CLASSES, 64, stage, micro_batch_size=b).needed for stage in (0, 1))

    assert needed(size) <= memory < needed(size + 1)
    assert largest_micro_batch(cfg, backbone, zero, CLASSES, 64, 2**30) is None


def plan(*arguments: str) -> int:
    return main(["--config", str(ROOT / "train/recipes/lvface_v1.yaml"), "--world-size", "64", *arguments])


ZERO_1 = ("--deepspeed_config", str(ROOT / "ds_configs/zero1_bf16.json"))


def test_the_command_says_memory_and_speed(tmp_path, capsys):
    assert plan(*ZERO_1, "--gpu", "h100", "--json", str(tmp_path / "plan.json")) == 0
    text = capsys.readouterr().out
    assert "Estimated, not measured, on H100" in text
    assert "no [n, n] matrix" in text
    assert "warning" not in text
    stage = json.loads((tmp_path / "plan.json").read_text())["budget"]["stages"][0]
    phases = {phase["phase"]: phase for phase in stage["memory"]["phases"]}
    assert stage["memory"]["peak_bytes"] == max(phase["bytes"] for phase in stage["memory"]["phases"])
    assert phases["head"]["bytes"] == sum(phases["head"]["parts"].values())
    assert phases["head"]["parts"]["class centers"] == 4 * 512 * 32_187
    assert stage["speed"]["step_s"] > 0
    assert plan(*ZERO_1) == 0
    assert "Estimated" not in capsys.readouterr().out


def test_the_pass_for_class_means_takes_about_a_third_of_an_epoch_and_counts(tmp_path, capsys):
    """Forward is a third of the products; nothing is recomputed, sent or stepped."""
    numbers = {}
    for name in ("random", "class_means"):
        out = tmp_path / f"{name}.json"
        assert plan(*ZERO_1, "--gpu", "h100", "--json", str(out), f"head.init_centers={name}", "model.init_from=w.safetensors") == 0
        numbers[name] = json.loads(out.read_text())["budget"]
    text = capsys.readouterr().out
    assert numbers["random"]["class_means_days"] is None
    days = numbers["class_means"]["class_means_days"]
    assert f"of which {24 * 60 * days:.1f} minutes for class means" in text
    stages, epochs = numbers["random"]["stages"], 100
    epoch = sum(stage["days"] for stage in stages) / epochs
    assert 0.15 * epoch < days < 0.45 * epoch


def test_what_does_not_fit_is_a_warning(capsys):
    assert plan(*ZERO_1, "--gpu", "l4", "model.activation_checkpointing=false") == 0
    assert "warning: stage early does not fit: it needs" in capsys.readouterr().out


def test_all_configs_are_a_table(tmp_path, capsys):
    assert plan("--all", "--json", str(tmp_path / "all.json"), "model.compile=true") == 0
    text = capsys.readouterr().out
    assert "zero1_bf16.json" in text
    assert "zero3_bf16.json: " in text  # refused, with the reason
    fits = {fit["config"]: fit for fit in json.loads((tmp_path / "all.json").read_text())["fits"]}
    assert len(fits) == len(list((ROOT / "ds_configs").glob("*.json")))
    assert fits["zero1_bf16.json"]["largest"]["80"] > fits["zero1_bf16.json"]["largest"]["24"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--deepspeed_config: expected one of ds_configs/*.json, found nothing"),
        ([*ZERO_1, "--gpu", "h1000"], "--gpu: expected one of b200, h200, h100"),
        ([*ZERO_1, "--gpu", "v100"], "V100-SXM2-32GB has no bf16 tensor cores; use one of ds_configs/*_fp16.json"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, expected):
    assert plan(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
