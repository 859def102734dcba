"""``python -m eval pairs``: what it prints, writes and how it fails; and the published model's published number."""

import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.__main__ import main
from eval.embedder import load_embedder
from eval.pairs import evaluate_pairs
from eval.pairs_file import find_pairs
from eval.results import read_results
from model.vit import build_vit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """A tiny model, eleven people of two equal images each, and pairs of them: command-line arguments that work."""
    torch.manual_seed(0)
    save_file(build_vit("vit_xxt", embedding_size=16).state_dict(), tmp_path / "w.safetensors")
    rng = np.random.default_rng(0)
    people = [f"P{index}" for index in range(11)]
    for person in people:
        (tmp_path / "images" / person).mkdir(parents=True)
        pixels = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        for number in (1, 2):
            Image.fromarray(pixels).save(tmp_path / "images" / person / f"{person}_{number:04d}.png")
    lines = ["10 1"]
    for first, second in itertools.pairwise(people):
        lines += [f"{first} 1 2", f"{first} 1 {second} 1"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    return ["pairs", *("--model", f"{tmp_path}/w.safetensors", "--images", f"{tmp_path}/images", "--pairs", f"{tmp_path}/pairs.txt")]


def test_pairs_prints_and_writes_the_numbers(arguments, tmp_path, capsys):
    assert main([*arguments, "--json", f"{tmp_path}/out.json", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "input range -1..1 (read from the model), batch size 4" in out
    assert "20 pairs of 21 images, embeddings of 16" in out
    assert "accuracy 100.00 % (std 0.00 over 10 folds, no interval)" in out  # equal images against different ones
    assert "TAR@FAR=1e-01 100.00 % (no interval, FAR " in out
    assert "TAR@FAR=1e-02 not resolved: needs 100 impostor pairs" in out
    assert "images/s" in out
    record = json.loads((tmp_path / "out.json").read_text())
    (entry,) = read_results([tmp_path / "out.json"])  # report reads what is written
    assert entry.result.curves.model_dump() == record["curves"]
    assert record["accuracy"]["mean"] == 1
    assert len(record["accuracy"]["accuracies"]) == len(record["accuracy"]["thresholds"]) == 10
    assert record["tar_at_far"][0]["far_target"] == 0.1
    assert record["unresolved_far"] == [1e-2, 1e-3, 1e-4]
    assert record["input_range"] == "-1..1"
    assert record["intervals"]["accuracy"] is None  # nothing but right
    assert (record["curves"]["genuine"], record["curves"]["impostor"]) == (10, 10)
    assert sorted(path.name for path in tmp_path.glob("*out.json*")) == ["out.json"]  # no temporary file left


def test_embeddings_of_the_cache_have_no_speed(arguments, tmp_path, capsys):
    words = [*arguments, "--cache", f"{tmp_path}/cache", "--json", f"{tmp_path}/out.json"]
    for speed in ("images/s", "embeddings from the cache"):
        assert main(words) == 0
        assert speed in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "out.json").read_text())["images_per_second"] is None


@pytest.mark.parametrize("words", [["--input-range", "-1..1"], ["--input-range=-1..1"]])
def test_an_input_range_that_begins_with_a_minus_may_stand_alone(arguments, words, capsys):
    assert main([*arguments, *words]) == 0
    assert "input range -1..1 (as told)" in capsys.readouterr().out


def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, tmp_path, capsys):
    (tmp_path / "images" / "P3" / "P3_0002.png").unlink()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "P3_0002" in error
    assert error.count("\n") == 1


def test_a_json_path_that_cannot_be_written_is_refused_before_the_work(arguments, tmp_path, capsys):
    assert main([*arguments, "--json", f"{tmp_path}/nowhere/out.json"]) == 2
    captured = capsys.readouterr()
    assert "nowhere/out.json: no such folder" in captured.err
    assert captured.out == ""
    assert main([*arguments, "--json", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "is a folder; --json names a file" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "/proc/out.json"], "/proc/out.json: can't be written: "),  # where nobody can make a file, root neither
        (["--plots", "/proc/plots"], "/proc/plots: can't be written: "),
        (["--cache", "/proc/cache"], "/proc/cache: can't be written: "),
        (["--cache", "pairs.txt"], "pairs.txt: is a file; --cache names a folder"),
        (["--cache", "pairs.txt/x"], "pairs.txt/x: no such folder: pairs.txt"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_opened(arguments, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_plots_are_written_for_one_model_and_refused_before_the_work_where_they_cannot_be(arguments, tmp_path, capsys):
    assert main([*arguments, "--plots", f"{tmp_path}/plots"]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["det.png", "histogram.png", "roc.png"]
    assert {Image.open(path).size for path in (tmp_path / "plots").iterdir()} == {(972, 540)}
    capsys.readouterr()
    for folder, message in (("pairs.txt", "pairs.txt: is a file; --plots names a folder"), ("pairs.txt/x", "pairs.txt/x: no such folder")):
        assert main([*arguments, "--plots", f"{tmp_path}/{folder}"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    files = [path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.png"))]
    (tmp_path / "p.bin").write_bytes(pickle.dumps((files[:20], [True] * 10), 2))
    assert main([*arguments[:3], "--pack", f"{tmp_path}/p.bin", "--plots", f"{tmp_path}/other"]) == 2
    assert "p.bin: its pairs are all of one kind, genuine or impostor" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_interrupt_ends_in_one_line_and_exit_code_130(arguments, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.commands.pairs.evaluate_pairs", interrupt)
    assert main([*arguments, "--json", f"{tmp_path}/out.json"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted; no file is half written"
    assert not (tmp_path / "out.json").exists()


def test_a_pack_of_the_folder_gives_the_same_numbers(arguments, tmp_path, capsys):
    model, folder, pack = arguments[1:3], arguments[3:], f"{tmp_path}/p.pairs.safetensors"
    assert main(["pack", *folder, pack]) == 0
    captured = capsys.readouterr()
    size = Path(pack).stat().st_size
    assert captured.out == f"{pack}: 20 pairs in 10 folds, 21 images, {size} bytes\n"
    assert "21/21 images" in captured.err
    assert main(["pairs", *model, *folder, "--json", f"{tmp_path}/folder.json"]) == 0
    assert main(["pairs", *model, "--pack", pack, "--json", f"{tmp_path}/pack.json"]) == 0
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("folder", "pack")]
    assert [records[0].pop("images"), records[0].pop("pairs")] == folder[1::2]
    assert records[1].pop("pack") == pack
    for record in records:
        assert record.pop("seconds") > 0
        assert record.pop("images_per_second") > 0
    assert records[0] == records[1]
    assert records[1]["source"] == "pairs.txt"
    assert (records[1]["intervals"]["identities"], records[1]["intervals"]["identities_inferred"]) == (11, False)


def test_a_bin_pack_is_evaluated_and_converted(arguments, tmp_path, capsys):
    files = [path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.png"))]
    flags = [k % 2 == 0 for k in range(20)]
    images = [file for k, same in enumerate(flags) for file in (files[k], files[k + 1 if same else (k + 4) % 22])]
    (tmp_path / "p.bin").write_bytes(pickle.dumps((images, flags), 2))
    assert main(["pack", f"{tmp_path}/p.bin", f"{tmp_path}/p.pairs.safetensors"]) == 0
    printed = []
    for name in ("p.bin", "p.pairs.safetensors"):
        capsys.readouterr()
        assert main([*arguments[:3], "--pack", f"{tmp_path}/{name}"]) == 0
        warning, *lines, _ = capsys.readouterr().out.splitlines()  # the last line is the speed
        assert warning == f"warning: {tmp_path}/{name}: 10 of 20 pairs are of an image with itself"  # a person's two images are equal
        printed.append(lines)
    assert printed[0] == printed[1]
    assert printed[0][2].startswith("20 pairs of ")
    assert ", inferred from the genuine pairs, 1000 times" in printed[0][-1]


@pytest.mark.parametrize(
    "given",
    [[], ["--images", "i"], ["--pairs", "p"], ["--images", "i", "--pairs", "p", "--pack", "x.bin"], ["--images", "i", "--pack", "x.bin"]],
)
def test_pairs_come_from_a_folder_or_a_pack_and_not_from_both(arguments, given, capsys):
    assert main([*arguments[:3], *given]) == 2
    assert capsys.readouterr().err == "error: give either --images DIR and --pairs PAIRS.txt, or --pack FILE\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.bin"], "x.bin: the output comes last, and its name ends in .pairs.safetensors"),
        (["x.pairs.safetensors"], "give either --images DIR and --pairs PAIRS.txt, or SRC.bin before the output"),
        (["x.bin", "y.pairs.safetensors", "--images", "i", "--pairs", "p"], "give either --images DIR and --pairs PAIRS.txt, or SRC.bin "),
        (["x.bin", "y.bin", "z.pairs.safetensors"], "expected one source and one output, got 3 files: x.bin y.bin z.pairs.safetensors"),
        (["x.bin", "nowhere/x.pairs.safetensors"], "nowhere/x.pairs.safetensors: no such folder: nowhere"),
        (["nowhere.bin", "x.pairs.safetensors"], "nowhere.bin: no such pack"),
    ],
)
def test_pack_says_what_is_missing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_hostile_pack_ends_in_one_line_and_exit_code_2(arguments, tmp_path, capsys):
    (tmp_path / "x.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    for words in ([*arguments[:3], "--pack", f"{tmp_path}/x.bin"], ["pack", f"{tmp_path}/x.bin", f"{tmp_path}/x.pairs.safetensors"]):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {tmp_path}/x.bin: asks for os.system, which no pack of images needs")
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_the_module_runs_from_the_repository_root_and_explains_itself():
    command = [sys.executable, "-m", "eval", "pairs", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    for word in ("--model", "--images", "--pairs", "--pack", "--input-range", "--batch-size", "--json", "run directory"):
        assert word in done.stdout


@pytest.mark.faces
def test_a_published_model_parts_the_pairs_of_real_faces(faces, tmp_path):
    """40 + 40 of the official pairs, at most 2 of them wrong (all 6,000 take minutes and give 99.38 %)."""
    lines = (faces / "protocol" / "lfw" / "pairs.txt").read_text().splitlines()
    chosen = ["2\t20"]
    for fold in (0, 1):
        start = 1 + 600 * fold
        chosen += lines[start : start + 20] + lines[start + 300 : start + 320]
    (tmp_path / "pairs.txt").write_text("\n".join(chosen))
    model = faces / "models" / "mobilefacenet_y1_ms1m.onnx"
    report = evaluate_pairs(load_embedder(model), find_pairs(faces / "lfw_112", tmp_path / "pairs.txt"))
    assert report.num_pairs == 80
    assert report.embedding_size == 128
    assert report.accuracy.mean >= 78 / 80
