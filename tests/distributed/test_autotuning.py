"""An experiment of DeepSpeed's autotuner from the command line, on two ranks: the engine measures, and the run ends in order."""

import base64
import json

import pytest

from tests.launch import launch
from tests.training import packed_faces, write_recipe


def experiment(tmp_path, **autotuning):
    recipe = write_recipe(tmp_path / "recipe.yaml", packed_faces(tmp_path), tmp_path / "run")
    ds_config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "train_batch_size": 8,
        "zero_optimization": {"stage": 1}, "autotuning": {"enabled": True, **autotuning},
    }  # fmt: skip
    text = base64.urlsafe_b64encode(json.dumps(ds_config).encode()).decode()
    result = launch(recipe, ranks=2, ds_config=text)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "global batch 8" in result.stdout  # of the experiment; the recipe has 32
    assert not (tmp_path / "run/summary.json").exists()
    return result


@pytest.mark.slow
def test_the_engine_writes_what_it_measured_in_the_steps_asked_for(tmp_path):
    result = experiment(tmp_path, start_profile_step=2, end_profile_step=3, metric_path=str(tmp_path / "metrics.json"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["throughput"] > 0
    assert "step 3/8" in result.stdout  # the engine ends the fourth step itself
    assert "step 4/8" not in result.stdout


@pytest.mark.slow
def test_the_profile_of_the_model_counts_the_parameters_of_the_backbone(tmp_path):
    from model.vit import build_vit

    experiment(tmp_path, model_info={"profile": True}, model_info_path=str(tmp_path / "info.json"))
    backbone = build_vit("vit_xxt", embedding_size=32)
    assert json.loads((tmp_path / "info.json").read_text())["num_params"] == sum(p.numel() for p in backbone.parameters())
