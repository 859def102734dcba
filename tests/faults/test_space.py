"""Disks that are full, broken or not to be written to: the run says which file and how much is missing, and loses no checkpoint."""

import resource

import pytest

from tests.faults.scene import Scene
from tests.launch import errors, launch
from tests.ranks import run_ranks
from tests.training import losses, packed_faces, train_on_rank, write_recipe
from train.dist import RankError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("space"))


@pytest.fixture
def scene(shards, tmp_path):
    with Scene(tmp_path, shards) as scene:
        yield scene


def steps_saved(output):
    return sorted(int(path.name[5:]) for path in output.glob("checkpoints/step_????????"))


@pytest.mark.fault("EIO on rank 1 in a background save", "file named, exit code 2 on all ranks")
def test_a_write_in_the_background_that_fails_on_one_rank_is_an_error_on_all_at_the_next_step(scene):
    scene.start({"rank": 1, "place": "write", "call": "every", "fault": "fail_io"}, checkpoint={"every_steps": 2})
    result = scene.end()
    (error,) = errors(result)
    assert "rank 1: " in error
    assert "rank_00001.pt: cannot be written (Input/output error" in error
    assert scene.codes() == {0: 2, 1: 2}
    assert max(losses(scene.output)) < 8
    assert not steps_saved(scene.output)
    assert scene.all_gone()


@pytest.mark.fault("files refused beyond a size", "file and free space named; older checkpoints whole")
def test_a_file_system_that_takes_no_more_stops_the_run_and_the_checkpoint_before_stays(scene, shards):
    """No file may become larger than 64 KiB: the first checkpoint of the process fails."""
    recipe = write_recipe(scene.folder / "before.yaml", shards, scene.output)
    with pytest.raises(AssertionError):
        run_ranks(2, train_on_rank, recipe, "zero1_fp32.json", (), (1, 5))
    before = steps_saved(scene.output)
    assert before
    limit = 64 * 1024
    scene.start(None, preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    result = scene.end()
    (error,) = errors(result)
    assert "cannot be written (File too large" in error
    assert "GB are free" in error
    assert scene.codes() == {0: 2, 1: 2}
    assert steps_saved(scene.output) == before
    assert run_ranks(2, train_on_rank, recipe, "zero1_fp32.json") == [8, 8]
    assert sorted(losses(scene.output)) == list(range(1, 9))


def train_with_little_space(group, recipe, free):
    from train import checkpoint

    checkpoint.free_bytes = lambda folder: free
    try:
        return train_on_rank(group, recipe, "zero1_fp32.json")
    except RankError as error:
        return str(error)


@pytest.mark.fault("no room for a checkpoint", "refused before the first step, with sizes")
def test_a_run_without_room_for_a_checkpoint_says_so_before_its_first_step(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run")
    for answer in run_ranks(2, train_with_little_space, recipe, 1_000_000):
        assert "a checkpoint of this run takes 0.0" in answer
        assert "and 0.001 GB are free" in answer
    assert not losses(tmp_path / "run")
    assert not steps_saved(tmp_path / "run")


@pytest.mark.fault("an output that cannot be written to", "named, exit code 2")
def test_an_output_that_cannot_be_written_to_is_named(shards, tmp_path):
    (tmp_path / "file").write_text("no folder")
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "file" / "run")
    result = launch(recipe)
    assert result.returncode == 2
    assert str(tmp_path / "file" / "run") in errors(result)[0]
