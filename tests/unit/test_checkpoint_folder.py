"""The commit protocol on the disk: what counts as a checkpoint, what the pointer is worth, what is kept."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from train.checkpoint_folder import (
    CheckpointError,
    CheckpointFolder,
    HashedFile,
    Retention,
    pointed_name,
    problem_of,
    read_manifest,
)

CONTENT = b"weights"
FILES = {"a.pt": {"bytes": 7, "sha256": hashlib.sha256(CONTENT).hexdigest()}}


@pytest.fixture
def said():
    return []


@pytest.fixture
def folder(tmp_path, said):
    return CheckpointFolder(tmp_path, said.append)


def commit(folder, step, score=None, retention=Retention(99)):  # noqa: B008 - frozen
    partial = folder.new_partial(step, "token")
    (partial / "a.pt").write_bytes(CONTENT)
    return folder.commit(partial, {"step": step, "score": score, "files": FILES}, retention)


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.path.glob("step_????????"))


def test_a_checkpoint_whose_files_match_the_manifest_is_complete_and_pointed_to(folder):
    checkpoint = commit(folder, 7)
    assert checkpoint.name == "step_00000007"
    assert problem_of(checkpoint) is None
    assert pointed_name(folder.path / "latest") == "step_00000007"
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step_00000007"]
    assert folder.newest() == checkpoint


def manifest(**changes):
    def damage(checkpoint):
        path = checkpoint / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "a.pt").unlink(), "a.pt is missing"),
        (lambda folder: (folder / "a.pt").write_bytes(CONTENT[:-1]), "a.pt has 6 bytes, the manifest says 7"),
        (lambda folder: (folder / "a.pt").write_bytes(b"wEights"), "the SHA-256 of a.pt is not the manifest's"),
        (lambda folder: (folder / "manifest.json").unlink(), "its manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files'), "its manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "its manifest cannot be read"),
        (manifest(files={"a.pt": 7}), "its manifest cannot be read"),
        (manifest(files=[]), "its manifest cannot be read"),
        (manifest(format=9), "its format is 9, this version reads 4"),
        (manifest(step=8), "its manifest is of step 8"),
        (manifest(files={"../a.pt": FILES["a.pt"]}), "its manifest names '../a.pt', which is no file in it"),
        (manifest(files={"/etc/passwd": FILES["a.pt"]}), "its manifest names '/etc/passwd', which is no file in it"),
    ],
)
def test_every_damage_is_named_and_the_checkpoint_before_is_taken(damage, expected, folder, said):
    before, checkpoint = commit(folder, 6), commit(folder, 7)
    damage(checkpoint)
    assert expected in problem_of(checkpoint)
    assert folder.newest() == before
    assert f"passing over checkpoint {checkpoint}: {problem_of(checkpoint)}" in said[0]
    assert pointed_name(folder.path / "latest") == "step_00000006"


def test_a_file_that_is_a_link_to_elsewhere_is_no_file_of_the_checkpoint(folder, tmp_path):
    checkpoint = commit(folder, 7)
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    (checkpoint / "a.pt").unlink()
    (checkpoint / "a.pt").symlink_to(tmp_path / "elsewhere")
    assert problem_of(checkpoint) == "a.pt is missing"


def test_swapped_files_are_noticed(folder):
    partial = folder.new_partial(1, "token")
    files = {}
    for name in ("rank_00000.pt", "rank_00001.pt"):
        with HashedFile(partial / name) as file:
            file.write(name.encode())
        files[name] = file.description()
    checkpoint = folder.commit(partial, {"step": 1, "files": files}, Retention(1))
    assert problem_of(checkpoint) is None
    os.replace(checkpoint / "rank_00000.pt", checkpoint / "kept")
    os.replace(checkpoint / "rank_00001.pt", checkpoint / "rank_00000.pt")
    os.replace(checkpoint / "kept", checkpoint / "rank_00001.pt")
    assert problem_of(checkpoint) == "the SHA-256 of rank_00000.pt is not the manifest's: its content has changed"


POINTERS = {
    "missing": (None, "cannot be read"),
    "empty": ("", "expected the name of a checkpoint beside it"),
    "dangling": ("step_00000099\n", "names step_00000099, which is not there"),
    "escaping": ("../../elsewhere/step_00000001\n", "expected the name of a checkpoint beside it"),
}


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_pointer_that_leads_nowhere_is_named_and_mended(pointer, folder, said):
    newest, (content, expected) = commit(folder, 7), POINTERS[pointer]
    path = folder.path / "latest"
    path.unlink() if content is None else path.write_text(content)
    assert folder.newest() == newest
    assert expected in said[0]
    assert "taking step_00000007, the newest complete checkpoint" in said[0]
    assert pointed_name(path) == "step_00000007"


def test_a_pointer_without_any_checkpoint_is_an_error_and_no_new_start(folder):
    (folder.path / "latest").write_text("step_00000007\n")
    with pytest.raises(CheckpointError, match="says that there was a checkpoint, but there is none"):
        folder.newest()


def test_without_a_complete_checkpoint_there_is_an_error_and_no_new_start(folder):
    (commit(folder, 7) / "a.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint here is complete \(1 passed over"):
        folder.newest()


def test_a_folder_without_anything_has_no_checkpoint(folder):
    assert folder.newest() is None


def test_what_a_killed_run_left_half_written_or_half_deleted_goes(folder):
    newest = commit(folder, 7)
    folder.new_partial(8, "other")
    (folder.path / "step_00000005.deleted").mkdir()
    assert folder.newest() == newest
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step_00000007"]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(1), [12]),
        (Retention(3), [10, 11, 12]),
        (Retention(99), list(range(1, 13))),
        (Retention(1, keep_every_steps=5), [5, 10, 12]),
        (Retention(2, keep_best=2), [3, 4, 11, 12]),
        (Retention(1, keep_every_steps=6, keep_best=1), [4, 6, 12]),
    ],
)
def test_retention_keeps_the_last_the_periodic_and_the_best(retention, kept, folder):
    """The scores rise to step 4 and fall from there on; steps 1 and 2 have none."""
    for step in range(1, 13):
        commit(folder, step, None if step < 3 else -abs(step - 4) + 0.1 * (step == 3), retention)
    assert steps(folder) == kept


def test_the_begin_of_a_run_is_no_period_of_it(folder):
    for step in (0, 4, 8, 9):
        commit(folder, step, retention=Retention(1, keep_every_steps=4))
    assert steps(folder) == [4, 8, 9]


def test_later_checkpoints_that_were_passed_over_do_not_count_and_stay(folder):
    for step in (1, 2, 9):
        commit(folder, step)
    commit(folder, 3, retention=Retention(2))
    assert steps(folder) == [2, 3, 9]
    assert pointed_name(folder.path / "latest") == "step_00000003"


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(folder):
    (commit(folder, 7) / "a.pt").unlink()
    assert problem_of(commit(folder, 7)) is None


def test_a_write_that_fails_leaves_no_file_under_the_name(tmp_path):
    def fail():
        with HashedFile(tmp_path / "a.pt") as file:
            file.write(CONTENT)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert not (tmp_path / "a.pt").exists()


_KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from tests.unit.test_checkpoint_folder import commit
from train import checkpoint_folder
from train.checkpoint_folder import CheckpointFolder, Retention

folder, call = CheckpointFolder(Path(sys.argv[1])), int(sys.argv[2])
calls = 0
def counted(module, name):
    original = getattr(module, name)
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, wrapper)
commit(folder, 1)
for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"), (os, "mkdir")):
    counted(module, name)
commit(folder, 2, retention=Retention(1))
print(calls)
"""


def test_a_kill_at_any_system_call_of_a_commit_and_a_deletion_leaves_a_complete_checkpoint(tmp_path):
    """Step 2 is committed and step 1 deleted, with a kill before the first, the second, ... call that changes the disk."""
    ends = []
    for call in range(1, 99):
        path = tmp_path / str(call)
        path.mkdir()
        process = subprocess.run([sys.executable, "-c", _KILLED, path, str(call)], capture_output=True, text=True, check=False)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        newest = CheckpointFolder(path, lambda text: None).newest()
        assert problem_of(newest) is None
        ends.append(read_manifest(newest)["step"])
        if process.returncode == 0:
            break
    assert int(process.stdout) == len(ends) - 1 >= 10
    assert ends == sorted(ends)
    assert set(ends) == {1, 2}
