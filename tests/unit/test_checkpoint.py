"""The commit protocol's parts that need no engine."""

import hashlib
import json

import pytest

from train.checkpoint import Checkpoints, Identity, _problem


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"weights")
    files = {"a.pt": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": 7, "files": files}))
    return folder


def test_a_checkpoint_whose_files_match_the_manifest_is_complete(checkpoint):
    assert _problem(checkpoint) is None


def manifest(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "a.pt").unlink(), "a.pt is missing"),
        (lambda folder: (folder / "a.pt").write_bytes(b"weight"), "a.pt has 6 bytes, the manifest says 7"),
        (lambda folder: (folder / "a.pt").write_bytes(b"wEights"), "the SHA-256 of a.pt is not the manifest's"),
        (lambda folder: (folder / "manifest.json").unlink(), "its manifest cannot be read"),
        (manifest('{"files'), "its manifest cannot be read"),
        (manifest("[]"), "its manifest cannot be read"),
        (manifest('{"format": 9, "step": 7, "files": {}}'), "its format is 9, this version reads 2"),
        (manifest('{"format": 2, "step": 8, "files": {}}'), "its manifest is of step 8"),
    ],
)
def test_every_damage_is_named(damage, expected, checkpoint):
    damage(checkpoint)
    assert expected in _problem(checkpoint)


def test_differences_name_the_nested_key_and_both_values():
    mine = Identity(2, 1, "fp32", {"optimizer": {"lr": 0.1}, "stages": [{"name": "a"}]}, {})
    saved = json.loads(json.dumps(vars(Identity(4, 1, "fp32", {"optimizer": {"lr": 0.2}, "stages": [{"name": "a"}]}, {}))))
    assert mine.differences(saved) == [
        "recipe.optimizer.lr: this run has 0.1, the checkpoint 0.2",
        "world_size: this run has 2, the checkpoint 4",
    ]
    assert mine.differences(json.loads(json.dumps(vars(mine)))) == []


def test_pruning_keeps_good_checkpoints_and_leaves_later_ones_that_were_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, ranks=None, identity=None, keep_last=2, preset="vit_t")
    for name in ("step_00000001", "step_00000002", "step_00000009", "step_00000003.partial"):
        (tmp_path / name).mkdir()
    checkpoints._commit(tmp_path / "step_00000003.partial", tmp_path / "step_00000003", {"format": 2, "step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000003", "step_00000009"]
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert _problem(tmp_path / "step_00000003") is None
