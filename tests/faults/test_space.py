"""Disks that are full, broken or not to be written to: the run says which file and how much is missing, and loses no checkpoint."""

import re
import resource
import subprocess

import pytest

from tests.launch import errors, launch
from tests.ranks import run_ranks
from tests.training import check_same_run, losses, train_on_rank, write_recipe
from train.checkpoint_folder import problem_of
from train.dist import RankError


def steps_saved(output):
    return sorted(int(path.name[5:]) for path in output.glob("checkpoints/step_????????"))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 MB, room for five checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system could be mounted, so none was filled: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.fault("the disk fills while a checkpoint is written", "file named, exit code 2 on all ranks; continued bit for bit")
def test_a_disk_that_fills_while_a_checkpoint_is_written_loses_none_of_those_before(scene, small_disk, finished):
    """A rank's file takes some 500 writes: the third is cut in two."""
    scene.output.symlink_to(small_disk)
    scene.start({"rank": 0, "place": "write", "call": 1400, "fault": "fill_the_disk"}, checkpoint={"every_steps": 1, "keep_last": 2})
    result = scene.end()
    (error,) = errors(result)
    assert re.search(rf"{re.escape(str(scene.output))}\S*: cannot be written \(No space left on device", error)
    assert scene.codes() == {0: 2, 1: 2}
    assert scene.all_gone()
    assert steps_saved(scene.output) == [1, 2]
    assert problem_of(scene.output / "checkpoints/step_00000002") is None
    (scene.output / "filler").unlink()
    assert scene.finish(checkpoint={"every_steps": 1, "keep_last": 2}).returncode == 0
    check_same_run(scene.output, finished())


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
