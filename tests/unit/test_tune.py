"""``train tune``: what is tried, what is refused, how a trial is judged, what can be told apart, and how a sweep goes on."""

import csv
import json
import re
import subprocess
import sys

import pytest

from tests.training import ROOT
from train import tune
from train.config import ConfigError, load_run_config
from train.ds_config import load_ds_config
from train.tune_process import FAILED, MEASURED, OUT_OF_MEMORY, REFUSED, SKIPPED, TIMED_OUT, Outcome, read_windows, why_failed
from train.tune_report import table, write_best
from train.tune_results import Results
from train.tune_settings import Settings, open_workload

DEMO = ROOT / "train/recipes/demo.yaml"
ZERO_1 = ROOT / "ds_configs/zero1_bf16.json"
PLAIN = Settings(64, 1, "bf16", checkpointing=False, overlap=True)


def settings(micro_batch_size=64, zero_stage=1, precision="bf16", checkpointing=False, overlap=True):
    return Settings(micro_batch_size, zero_stage, precision, checkpointing, overlap)


def workload(*overrides, recipe=DEMO, ds_config=ZERO_1, stage=None, ranks=2, device="cpu"):
    return open_workload(recipe, ("data.path=d", "output=o", *overrides), ds_config, stage, ranks, device, window_steps=4, windows=3)


def measured(*windows, peak=2**30):
    return Outcome(MEASURED, "", windows, peak, seconds=10.0)


# --- settings


@pytest.mark.parametrize(("micro", "accumulation"), [(16, 4), (32, 2), (64, 1)])
def test_the_global_batch_stays_and_the_accumulation_follows(micro, accumulation, tmp_path):
    work, tried = workload(), settings(micro)
    cfg = load_run_config(DEMO, work.trial_overrides(tried, tmp_path))
    (stage,) = cfg.stages
    assert (cfg.stage_batch(0).micro_batch_size, cfg.stage_batch(0).accumulation(2)) == (micro, accumulation)
    assert cfg.stage_batch(0).images_per_step(2) == work.global_batch_size == 128
    assert (stage.name, stage.centers, stage.steps, stage.epochs) == ("stable", "pco", 4 * (1 + 3), None)
    assert (cfg.output, cfg.resume, cfg.metrics.port, cfg.metrics.log_every, cfg.checkpoint.every_steps) == (tmp_path, "never", 0, 4, None)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("demo", []),
        ("demo", ["batch.grad_accum_steps=3"]),
        ("demo", ["batch.global_batch_size=384"]),
        ("lvface_pco", []),  # its last stage has a batch of its own
        ("demo", ["stages.1.batch={micro_batch_size: 8, global_batch_size: 96}", "batch.global_batch_size=128"]),
    ],
)
def test_pasted_overrides_keep_the_global_batch_of_every_stage(recipe, overrides):
    file = ROOT / f"train/recipes/{recipe}.yaml"
    work = workload(*overrides, recipe=file)
    tried = settings(4, checkpointing=True)
    before, after = (load_run_config(file, [*work.overrides, *more]) for more in ([], work.changes(tried)))
    for index in range(len(before.stages)):
        assert after.stage_batch(index).images_per_step(2) == before.stage_batch(index).images_per_step(2)
    assert after.stage_batch(work.stage).micro_batch_size == 4
    assert after.model.activation_checkpointing


def test_on_a_gpu_a_trial_is_a_window_longer_because_its_clock_tells_of_the_window_before(tmp_path):
    cfg = load_run_config(DEMO, workload(device="cuda").trial_overrides(PLAIN, tmp_path))
    assert cfg.stages[0].steps == 4 * (1 + 3 + 1)


def test_another_stage_can_be_measured_and_an_unknown_one_is_named(tmp_path):
    (stage,) = load_run_config(DEMO, workload(stage="early").trial_overrides(PLAIN, tmp_path)).stages
    assert (stage.name, stage.sample_rate, stage.update_expectation) == ("early", 0.3, True)
    with pytest.raises(ConfigError, match=r"--stage: no such stage in .*demo.yaml: late; it has early, stable"):
        workload(stage="late")


def test_a_frozen_stage_is_measured_as_if_it_were_trained_and_without_weights(tmp_path):
    finetune = DEMO.with_name("lfw_tiny_finetune.yaml")
    for stage in ("head", "whole"):
        work = workload("model.init_from=given", recipe=finetune, stage=stage)
        cfg = load_run_config(finetune, work.trial_overrides(PLAIN, tmp_path))
        assert (cfg.stages[0].freeze_backbone, cfg.head.init_centers, cfg.model.init_from) == (False, "random", None)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_json_of_settings_is_that_of_the_shipped_file_for_them(stage, precision):
    shipped = json.loads((ROOT / f"ds_configs/zero{stage}_{precision}.json").read_text())
    assert workload(device="cuda").deepspeed_config(settings(zero_stage=stage, precision=precision)) == shipped


def test_what_the_user_s_json_says_stays(tmp_path):
    own = {
        "train_batch_size": 128, "steps_per_print": 7, "bf16": {"enabled": True, "immediate_grad_update": True},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 5},
    }  # fmt: skip
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    changed = workload(ds_config=file).deepspeed_config(settings(zero_stage=1, overlap=False))
    assert (changed["steps_per_print"], changed["bf16"], changed["train_batch_size"]) == (7, own["bf16"], "auto")
    assert changed["zero_optimization"] == {
        "stage": 1, "overlap_comm": False, "reduce_bucket_size": 1000, "allgather_bucket_size": 25_000_000
    }  # fmt: skip
    autocast = workload(ds_config=file).deepspeed_config(settings(precision="bf16_autocast"))
    assert "bf16" not in autocast
    assert autocast["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    kept = workload(ds_config=file).deepspeed_config(settings(zero_stage=3))
    assert (kept["zero_optimization"]["stage3_prefetch_bucket_size"], kept["zero_optimization"]["stage3_max_reuse_distance"]) == (5, 10**8)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "bf16_autocast"])
def test_every_json_that_is_not_refused_can_be_loaded_from_its_file(stage, precision, tmp_path):
    work, tried = workload(), settings(zero_stage=stage, precision=precision)
    assert work.refusal(tried) is None
    (tmp_path / "x.json").write_text(json.dumps(work.deepspeed_config(tried)))
    summary = load_ds_config(tmp_path / "x.json", work.cfg, 2, "cpu")[1]
    assert (summary.zero_stage, summary.precision) == (stage, precision)


@pytest.mark.parametrize(
    ("tried", "overrides", "reason"),
    [
        (settings(zero_stage=0), [], r"zero_optimization\.stage: ZeRO 0 with bf16 makes a hidden first step"),
        (settings(precision="fp16"), [], r"fp16\.enabled: fp16 needs a GPU"),
        (settings(micro_batch_size=33), [], r"batch\.global_batch_size: 128 is no multiple .* 33 x 2; batch\.micro_batch_size=32 would do"),
        (settings(micro_batch_size=1), [], r"batch\.micro_batch_size: must be at least 2, got 1"),
        (settings(zero_stage=3), ["model.compile=true"], r"zero_optimization\.stage: 3 gathers each layer's weights"),
    ],
)
def test_settings_that_training_would_refuse_are_refused_with_its_reason(tried, overrides, reason):
    assert re.match(reason, workload(*overrides).refusal(tried))


def test_a_json_that_would_end_every_trial_is_refused_at_once(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "autotuning": {"enabled": True}}))
    with pytest.raises(ConfigError, match=r"autotuning\.enabled: true ends a run after a few steps"):
        workload(ds_config=tmp_path / "x.json")


# --- trials


def window(seconds, images=512, steps=4, skipped=0):
    return {
        "images": images,
        "steps": steps,
        "outcomes": {"applied": steps - skipped},
        "step_seconds": {"total": seconds} if seconds else {},
    }


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([window(9.0), window(0.5), window(0.25)], (256.0, 512.0)),  # 128 images a step; the first warms up
        ([window(None), window(9.0), window(0.5)], (256.0,)),  # a GPU's clock is late
        ([window(9.0), window(0.5), window(0.1, skipped=1)], (256.0,)),
        ([window(9.0), window(0.1, skipped=4)], ()),
    ],
)
def test_windows_that_count_are_images_per_second(windows, expected, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in windows))
    assert read_windows(tmp_path / "metrics.jsonl") == expected


CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"
CPU = "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
LAUNCHER = "[ERROR] [launch.py:325:sigkill_handler] ['python', '-m', 'train.tune_trial'] exits with return code = {}"


@pytest.mark.parametrize(
    ("log", "code", "oom_kills", "status", "reason"),
    [
        (f"rank 1:\nTraceback\n{CUDA}\n{LAUNCHER.format(1)}", 1, 0, OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of memory"),
        (f"rank 0:\n  {CPU}", 1, 0, OUT_OF_MEMORY, "RuntimeError: [enforce fail"),
        ("MemoryError", 1, 0, OUT_OF_MEMORY, "MemoryError"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", -6, 0, OUT_OF_MEMORY, "terminate called"),
        (LAUNCHER.format(-9), 0, 2, OUT_OF_MEMORY, "the kernel ended a process"),
        (LAUNCHER.format(-9), 0, 0, FAILED, "a rank was ended by SIGKILL; the kernel counts no process"),
        ("", -9, 0, FAILED, "a rank was ended by SIGKILL"),
        ("step 1\nerror: no such file: x\n", 2, 0, FAILED, "error: no such file: x"),
        ("Traceback\nValueError: first\nTypeError: last\nmore", 1, 0, FAILED, "TypeError: last"),
        ("nothing to see", 3, 0, FAILED, "exit code 3"),
    ],
)
def test_a_trial_that_did_not_end_well_says_why(log, code, oom_kills, status, reason):
    found, text = why_failed(log, code, oom_kills)
    assert (found, text[: len(reason)]) == (status, reason)


# --- results


def test_results_are_read_back_from_the_csv_as_they_were_written(tmp_path):
    outcomes = {
        (PLAIN, 0): measured(100.25, 200.5, peak=12345),
        (PLAIN, 1): measured(150.0),
        (settings(precision="fp32", checkpointing=True, overlap=False), 0): Outcome(OUT_OF_MEMORY, 'a "comma", and\na line', seconds=3.0),
    }
    written = Results(tmp_path, {"ranks": 2})
    for (tried, repeat), outcome in outcomes.items():
        written.add(tried, repeat, outcome)
    assert Results(tmp_path, {"ranks": 2}).rows == outcomes
    first = next(csv.DictReader((tmp_path / "results.csv").open()))
    assert (first["images_per_second"], first["peak_bytes"], first["status"]) == ("150.38", "12345", "measured")


def test_results_of_another_sweep_are_not_gone_on_with(tmp_path):
    Results(tmp_path, {"ranks": 2, "recipe": {"a": 1}})
    with pytest.raises(ConfigError, match=r"sweep\.json: this folder holds a sweep of another recipe; give --output another folder"):
        Results(tmp_path, {"ranks": 2, "recipe": {"a": 2}})


def test_settings_whose_windows_overlap_are_within_noise_and_others_are_not(tmp_path):
    results = Results(tmp_path, {})
    fast, near, far = settings(16), settings(32), settings(64)
    results.add(far, 0, measured(50.0, 60.0, 55.0))
    results.add(near, 0, measured(90.0, 101.0, 95.0, peak=2**29))
    results.add(fast, 0, measured(110.0, 100.0, 120.0))
    first, second, third = results.ranking()
    assert [entry.settings for entry in (first, second, third)] == [fast, near, far]
    assert second.within_noise_of(first)
    assert not third.within_noise_of(first)
    work = workload()
    lines = table(work, results).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2=", "3"]
    text = write_best(work, results, tmp_path, ["data.path=d"])
    assert "within noise: the windows of 2 settings overlap" in text
    assert "least memory of these takes micro-batch 32" in text
    results.add(near, 0, measured(80.0))
    assert "a single window does not tell how much they vary" in write_best(work, results, tmp_path, [])
    results.add(near, 0, measured(70.0, 80.0))
    assert "that is 46.7% above it, and no two windows of the two overlap" in write_best(work, results, tmp_path, [])  # 110 / 75


def test_what_was_measured_again_stays_before_the_rest_if_the_machine_gets_slower(tmp_path):
    results = Results(tmp_path, {})
    results.add(settings(16), 0, measured(100.0))
    results.add(settings(32), 0, measured(90.0))
    results.add(settings(16), 1, measured(50.0))
    assert [entry.settings.micro_batch_size for entry in results.ranking()] == [16, 32]
    assert [entry.settings.micro_batch_size for entry in results.ranking(repeats=False)] == [16, 32]
    assert results.ranking()[0].windows == (100.0, 50.0)


def test_the_best_settings_are_written_with_a_command_that_training_accepts(tmp_path):
    results = Results(tmp_path, {})
    results.add(settings(16, 3, "fp32", checkpointing=True), 0, measured(100.0))
    text = write_best(workload(), results, tmp_path, ["data.path=d", "output=o"])
    assert (tmp_path / "best.txt").read_text() == f"{text}\n"
    assert "global batch 128 = 16 x 4 x 2, as in the recipe" in text
    assert "another one trains otherwise: the head's loss is over 32 images at a time, BatchNorm's statistics over 16" in text
    assert "another precision also trains otherwise" in text
    words = text.splitlines()[-1].split()
    cfg = load_run_config(words[words.index("--config") + 1], words[words.index("--deepspeed_config") + 2 :])
    _, summary = load_ds_config(words[words.index("--deepspeed_config") + 1], cfg, 2, "cpu")
    assert (cfg.batch.micro_batch_size, cfg.batch.images_per_step(2), cfg.model.activation_checkpointing) == (16, 128, True)
    assert (summary.zero_stage, summary.precision) == (3, "fp32")


# --- sweeps


@pytest.fixture
def trials(monkeypatch):
    """Outcomes by micro-batch in place of real trials; the micro-batches tried, in their order, are noted."""
    outcomes, tried = {}, []

    def run_trial(work, tried_settings, folder, timeout_s):
        tried.append(tried_settings.micro_batch_size)
        outcome = outcomes[tried_settings.micro_batch_size]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(tune, "run_trial", run_trial)
    return outcomes, tried


def sweep(folder, *micro_batches, repeats=0):
    said = []
    folder.mkdir(exist_ok=True)
    results = Results(folder, {})
    tune.Sweep(workload(), results, folder, 1.0, said.append).run([settings(size) for size in micro_batches], repeats)
    return results, said


def test_a_micro_batch_out_of_memory_spares_the_larger_ones(trials, tmp_path):
    outcomes, tried = trials
    outcomes.update({16: measured(1.0), 32: Outcome(OUT_OF_MEMORY, "CUDA out of memory")})
    results, _ = sweep(tmp_path, 16, 32, 64, 48)
    assert tried == [16, 32]
    assert results.rows[settings(64), 0] == Outcome(SKIPPED, "a micro-batch of 32 is out of memory already")
    assert results.rows[settings(48), 0].status == REFUSED  # 128 images are no multiple of it


def test_a_sweep_that_was_interrupted_goes_on_where_it_stood_and_tries_again_what_failed(trials, tmp_path):
    outcomes, tried = trials
    outcomes.update({8: Outcome(FAILED, "x"), 16: measured(1.0), 32: Outcome(TIMED_OUT, "y"), 64: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, 8, 16, 32, 64)
    outcomes.update({8: measured(3.0), 64: measured(2.0)})
    results, said = sweep(tmp_path, 8, 16, 32, 64)
    assert tried == [8, 16, 32, 64, 8, 64]
    assert [results.rows[settings(size), 0].status for size in (8, 16, 32, 64)] == [MEASURED, MEASURED, TIMED_OUT, MEASURED]
    assert said[0].startswith("4 settings: 2 to measure, 0 refused, 2 known from before")


def test_the_best_two_and_a_third_within_noise_are_measured_again_in_turn(trials, tmp_path):
    outcomes, tried = trials
    outcomes.update({8: measured(100.0, 90.0), 16: measured(80.0, 70.0), 32: measured(60.0, 50.0), 64: measured(40.0)})
    sweep(tmp_path / "clear", 8, 16, 32, 64, repeats=2)
    assert tried == [8, 16, 32, 64, 8, 16, 8, 16]
    tried.clear()
    outcomes[32] = measured(95.0, 50.0)
    sweep(tmp_path / "noisy", 8, 16, 32, 64, repeats=1)
    assert tried == [8, 16, 32, 64, 8, 16, 32]


def test_progress_counts_trials_and_estimates_what_is_left(trials, tmp_path):
    outcomes, _ = trials
    outcomes.update({32: measured(1.0), 64: measured(2.0)})  # 10 s each
    _, said = sweep(tmp_path, 32, 64)
    assert said[1] == "[1/2] micro-batch 32, ZeRO 1, bf16, checkpointing off, overlap on; ETA after the first"
    assert said[3] == "[2/2] micro-batch 64, ZeRO 1, bf16, checkpointing off, overlap on; ETA 0:10"


# --- the command


def run_tune(*arguments):
    command = [sys.executable, "-m", "train", "tune", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--zero", "1,4"], "argument --zero: must be values between commas, each a ZeRO stage, 0 to 3, got '1,4'"),
        (["--overlap", "yes"], "argument --overlap: must be values between commas, each on or off, got 'yes'"),
        (["--precision", "bf61"], "each one of bf16, fp16, fp32, bf16_autocast, got 'bf61'"),
        (["--stage", "late", "data.path=d"], "error: --stage: no such stage in"),
        (["data.path=nowhere"], "error: nowhere"),
        (["optimizer.lrr=1"], "error: optimizer.lrr: unknown key; did you mean lr?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, expected, tmp_path):
    result = run_tune("--config", DEMO, "--deepspeed_config", ZERO_1, "--output", tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_help_explains_the_axes_and_the_exit_codes():
    result = run_tune("--help")
    assert result.returncode == 0
    for word in ("--micro-batch", "--zero", "--precision", "--checkpointing", "--overlap", "global batch", "results.csv", "Exit codes"):
        assert word in result.stdout
