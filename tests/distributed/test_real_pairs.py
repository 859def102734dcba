"""The published model reaches its published number on LFW's 6,000 pairs, whichever way they take."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from eval.pair_pack import open_pack, write_pack
from eval.pairs_file import find_pairs
from tests.training import ROOT, free_port

pytestmark = [pytest.mark.faces, pytest.mark.slow, pytest.mark.timeout(1500)]

RANKS = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module", "eval"]


@pytest.fixture(scope="module")
def packs(faces, tmp_path_factory):
    """The official pairs as a pack of ours, and as the field's pickle."""
    folder = tmp_path_factory.mktemp("packs")
    pairs = find_pairs(faces / "lfw_112", faces / "protocol/lfw/pairs.txt")
    write_pack(pairs, folder / "lfw.pairs.safetensors")
    images = [pairs.images.read(image) for pair in pairs.pairs for image in pair]
    (folder / "lfw.bin").write_bytes(pickle.dumps((images, pairs.same.tolist()), 2))
    assert len(open_pack(folder / "lfw.bin").images) <= len(pairs.images)  # images of equal bytes are one
    return folder


@pytest.mark.parametrize(
    ("start", "source", "options"),
    [
        (["-m", "eval"], "folder", []),
        (["-m", "eval"], "lfw.pairs.safetensors", ["--batch-size", "17"]),
        (["-m", "eval"], "lfw.bin", ["--decoder", "dali", "--batch-size", "256"]),
        (RANKS, "folder", []),
        (RANKS, "lfw.pairs.safetensors", ["--decoder", "dali"]),
    ],
    ids=["folder", "pack, batches of 17", "field's pack, DALI", "folder, 2 ranks", "pack, DALI, 2 ranks"],
)
def test_mobilefacenet_parts_the_official_pairs_with_99_38_percent(faces, packs, tmp_path, start, source, options):
    folder = ["--images", faces / "lfw_112", "--pairs", faces / "protocol/lfw/pairs.txt"]
    pairs = folder if source == "folder" else ["--pack", packs / source]
    words = ["pairs", "--model", faces / "models/mobilefacenet_y1_ms1m.onnx", *pairs, *options, "--json", tmp_path / "out.json"]
    command = [str(free_port()) if word == "PORT" else str(word) for word in [sys.executable, *start, *words]]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy 99.") == 1  # said once, whatever the number of ranks
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["num_pairs"] == 6000
    assert report["accuracy"]["mean"] == pytest.approx(0.9938, abs=2e-4)
