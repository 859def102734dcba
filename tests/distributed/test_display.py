"""What a run shows: on a terminal, and in TensorBoard after a kill."""

import json

import pytest

from tests.events import scalars
from tests.launch import launch_process
from tests.ranks import run_ranks
from tests.screen import Screen
from tests.training import losses, packed_faces, train_on_rank, write_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("faces"))


@pytest.mark.slow
def test_under_deepspeed_the_view_stays_below_all_that_ranks_and_launcher_say(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run")
    screen = Screen(columns=300, rows=50)
    process = launch_process(recipe, ranks=2, environment={"TERM": "xterm"}, stdout=screen.descriptor, stderr=screen.descriptor)
    screen.wait_for(lambda: any(line.startswith("step ") and "/8" in line and "━" in line for line in screen.rows()), seconds=120)
    assert not screen.scrolls_whole
    screen.wait_for(lambda: screen.rows() and process.poll() is not None, seconds=120)
    lines = screen.everything()
    assert process.returncode == 0
    assert screen.scrolls_whole
    assert not [line for line in lines if "━" in line]  # nothing of the view is left
    assert [line.split()[:2] for line in lines if line.startswith("step ")] == [["step", "8/8"]]  # but the last line
    for text in ("stage early: steps 1 to 4", "stage stable: steps 5 to 8", "checkpoint ", "done", "exits successfully"):
        assert [line for line in lines if text in line], text
    assert lines.index(next(line for line in lines if line.startswith("step 8/8"))) < lines.index("done")
    screen.close()


@pytest.mark.slow
def test_after_a_kill_tensorboard_shows_every_step_once(shards, tmp_path):
    """Rank 0 is killed a step after a checkpoint; each step is logged."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, run, metrics={"port": 0, "log_every": 1, "tensorboard": True})
    with pytest.raises(AssertionError):
        run_ranks(2, train_on_rank, recipe, "zero1_fp32.json", (), (0, 5))
    assert run_ranks(2, train_on_rank, recipe, "zero1_fp32.json") == [8, 8]
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) > len(set(logged)) == 8
    assert scalars(run / "tensorboard")["lvface_loss"] == pytest.approx(losses(run))
