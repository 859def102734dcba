"""The commit protocol's parts that need no engine."""

import json

import pytest

from train.checkpoint import Identity, _problem, _write_durably


@pytest.fixture
def checkpoint(tmp_path):
    import hashlib

    (tmp_path / "a.pt").write_bytes(b"weights")
    files = {"a.pt": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return tmp_path


def test_a_checkpoint_whose_files_match_the_manifest_is_complete(checkpoint):
    assert _problem(checkpoint) is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "a.pt").unlink(), "a.pt is missing"),
        (lambda folder: (folder / "a.pt").write_bytes(b"weight"), "a.pt has 6 bytes, the manifest says 7"),
        (lambda folder: (folder / "a.pt").write_bytes(b"wEights"), "the SHA-256 of a.pt is not the manifest's"),
        (lambda folder: (folder / "manifest.json").unlink(), "its manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files'), "its manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 9, "files": {}}'), "its format is 9, this version reads 1"),
    ],
)
def test_every_damage_is_named(damage, expected, checkpoint):
    damage(checkpoint)
    assert expected in _problem(checkpoint)


def test_differences_name_the_nested_key_and_both_values():
    mine = Identity(2, 1, "fp32", {"optimizer": {"lr": 0.1}, "stages": [{"name": "a"}]})
    saved = json.loads(json.dumps(vars(Identity(4, 1, "fp32", {"optimizer": {"lr": 0.2}, "stages": [{"name": "a"}]}))))
    assert mine.differences(saved) == [
        "recipe.optimizer.lr: this run has 0.1, the checkpoint 0.2",
        "world_size: this run has 2, the checkpoint 4",
    ]
    assert mine.differences(json.loads(json.dumps(vars(mine)))) == []


def test_a_pointer_is_replaced_whole(tmp_path):
    for text in ("step_00000001\n", "step_00000002\n"):
        _write_durably(tmp_path / "latest", text)
        assert (tmp_path / "latest").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
