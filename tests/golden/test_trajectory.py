"""Fifty steps on synthetic faces must lose what they lost before. ``python -m tests.golden.test_trajectory`` records them anew.

A refactoring leaves the record alone; a change of mathematics records it again and says why.
"""

import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import losses, packed_faces, train_on_rank, write_recipe

RECORD = Path(__file__).with_name("fifty_steps.json")
STAGES = [
    {"name": "early", "steps": 30, "sample_rate": 0.5, "update_expectation": True},
    {"name": "stable", "steps": 20, "centers": "pco", "update_expectation": True},
]


def trajectory(folder):
    changes = {"stages": STAGES, "checkpoint": {}, "batch": {"micro_batch_size": 12}, "optimizer": {"lr": 3e-4}}
    recipe = write_recipe(folder / "recipe.yaml", packed_faces(folder), folder / "run", **changes)
    run_ranks(2, train_on_rank, recipe, "zero1_fp32.json")
    return [loss for _, loss in sorted(losses(folder / "run").items())]


def test_fifty_steps_lose_what_they_lost_before(tmp_path):
    record = json.loads(RECORD.read_text())
    assert trajectory(tmp_path) == pytest.approx(record["losses"], rel=record["tolerance"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            "seed": 0,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            # Another CPU sums in another order, and fifty steps with ReLU6 and BatchNorm of 12 images amplify it.
            "tolerance": 0.02,
            "losses": trajectory(Path(folder)),
        }
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
