"""Experiments of DeepSpeed's autotuner: its own scheduler writes the command line, our entry point reads it."""

import base64
import json

import pytest

from tests.training import ROOT
from train.autotuning import read_ds_config, with_batch_of
from train.config import ConfigError, RunConfig
from train.ds_config import DeepSpeedSummary, complete_ds_config

ENABLED = {"enabled": True, "start_profile_step": 2, "end_profile_step": 3}


def recipe(**changes) -> RunConfig:
    stages = [{"name": "early", "steps": 1}, {"name": "late", "steps": 1, "batch": {"micro_batch_size": 6, "global_batch_size": 24}}]
    return RunConfig.model_validate(
        {"output": "o", "data": {"path": "d"}, "batch": {"micro_batch_size": 4, "global_batch_size": 64}, "stages": stages, **changes}
    )


@pytest.fixture
def handed_over(tmp_path, monkeypatch):
    """What stands after --deepspeed_config in the command that DeepSpeed's scheduler starts for an experiment."""
    from deepspeed.autotuning import scheduler

    def argument(ds_config: dict) -> str:
        commands = []

        class Process:
            returncode = 0

            def __init__(self, command, **_):
                commands.append(command)

            def wait(self):
                return 0

        monkeypatch.setattr(scheduler.subprocess, "Popen", Process)
        experiment = {
            "exp_id": 0, "name": "z1", "result_dir": str(tmp_path / "z1"), "master_port": 1, "hostfile": "h", "ds_config": ds_config
        }  # fmt: skip
        scheduler.run_experiment(experiment, [], "--module", ["train", "--config", "r.yaml", "--deepspeed_config", "user.json", "output=o"])
        command = commands[0]
        assert command[-6:-2] == ["train", "--config", "r.yaml", "--deepspeed_config"]
        return command[-2]

    return argument


def test_the_string_of_deepspeed_s_scheduler_is_the_json_that_it_means(handed_over):
    sent = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "autotuning": ENABLED, "steps_per_print": 255}
    document, experiment = read_ds_config(handed_over(sent))
    assert document.data == sent
    assert experiment


@pytest.mark.parametrize("text", ["???>>>~~~", "ÿþýüûúùø"])  # bytes that urlsafe base64 writes with - and _
def test_the_string_may_hold_what_plain_base64_spells_otherwise(handed_over, text):
    sent = {"autotuning": {**ENABLED, "results_dir": text}}
    assert read_ds_config(handed_over(sent))[0].data == sent


def test_the_batch_of_an_experiment_is_that_of_the_json_in_every_stage(handed_over):
    sent = {
        "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3, "train_batch_size": 48, "gradient_clipping": "auto",
        "zero_optimization": {"stage": 1}, "autotuning": ENABLED,
    }  # fmt: skip
    document, cfg = with_batch_of(read_ds_config(handed_over(sent))[0], recipe())
    assert [(cfg.stage_batch(index).micro_batch_size, cfg.stage_batch(index).accumulation(2)) for index in range(2)] == [(8, 3), (8, 3)]
    config, summary = complete_ds_config(document, cfg, 2, "cpu")
    assert summary == DeepSpeedSummary(1, "fp32")
    assert (config["train_batch_size"], config["gradient_clipping"], config["autotuning"]) == (48, 5.0, ENABLED)


def test_the_profile_of_the_model_which_asks_for_one_image_gets_the_two_that_batchnorm_needs(handed_over):
    sent = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    profile = {**sent, "autotuning": {"enabled": True, "model_info": {"profile": True}}}
    document, cfg = with_batch_of(read_ds_config(handed_over(profile))[0], recipe())
    config, _ = complete_ds_config(document, cfg, 1, "cpu")
    assert (cfg.batch.micro_batch_size, config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"batch\.micro_batch_size: must be at least 2, got 1"):
        with_batch_of(read_ds_config(handed_over({**sent, "autotuning": ENABLED}))[0], recipe())


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation: unknown or unsupported key"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: ZeRO 0 with fp32"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, "optimizer: refused: the recipe owns it"),
        ({"zero_optimization": {"stage": 1}, "autotuning": {**ENABLED, "metrics": "flops"}}, "autotuning.metrics: unknown or unsupported"),
        ({"zero_optimization": {"stage": 1}, "train_batch_size": 99}, "train_batch_size: 99 contradicts"),
    ],
)
def test_an_experiment_is_checked_like_any_json(handed_over, sent, expected):
    document, cfg = with_batch_of(read_ds_config(handed_over({"autotuning": ENABLED, **sent}))[0], recipe())
    with pytest.raises(ConfigError, match=r"--deepspeed_config, JSON in base64") as caught:
        complete_ds_config(document, cfg, 1, "cpu")
    assert str(caught.value).startswith(expected)


def test_a_file_is_read_as_before_and_is_no_experiment():
    path = ROOT / "ds_configs/zero1_bf16.json"
    document, experiment = read_ds_config(str(path))
    assert (document.data, experiment) == (json.loads(path.read_text()), False)


def test_a_file_with_autotuning_switched_on_is_refused_because_the_run_would_end_after_a_few_steps(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"autotuning": ENABLED}))
    with pytest.raises(ConfigError, match=r"autotuning\.enabled: true ends a run after a few steps; .*x\.json, line 1"):
        read_ds_config(str(file))
    file.write_text(json.dumps({"autotuning": {"enabled": False}}))
    assert not read_ds_config(str(file))[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ds_configs/none.json", "no such file: ds_configs/none.json"),
        ("ds_configs/none", "no such file: ds_configs/none"),
        (base64.urlsafe_b64encode(b"{1}").decode(), r"not JSON: .*--deepspeed_config, JSON in base64, line 1"),
        (base64.urlsafe_b64encode(b"[1]").decode(), r"expected keys and values at the top, got \[1\]"),
    ],
)
def test_what_is_neither_a_file_nor_json_is_refused_in_one_line(text, expected):
    with pytest.raises(ConfigError, match=expected):
        read_ds_config(text)


def test_an_experiment_trains_the_backbone_from_its_first_step_on(handed_over):
    frozen = [{"name": "head", "steps": 1, "freeze_backbone": True}, {"name": "whole", "steps": 1}]
    _, cfg = with_batch_of(read_ds_config(handed_over({"autotuning": ENABLED}))[0], recipe(stages=frozen))
    assert [stage.freeze_backbone for stage in cfg.stages] == [False, False]
