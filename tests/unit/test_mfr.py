"""MFR-Ongoing's protocol on small sets: which images meet which, what is absent, what is refused; and its commands."""

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval import mfr
from eval.__main__ import main
from eval.embed import embed
from eval.embedder import load_embedder
from eval.errors import EvalError
from eval.mfr_folder import FOLDERS, RACES, face_images, read_folder
from eval.results import read_results
from eval.verification import tar_at_far
from model.vit import build_vit
from tests.unit.test_mfr_package import tiny_model

SETS = (*FOLDERS[:2], *RACES, "mr_all")


def write_people(folder: Path, people: list[str], images: int, seed: int) -> None:
    """Images of each person: blocks of colours, and noise."""
    rng = np.random.default_rng(seed)
    for person in people:
        (folder / person).mkdir(parents=True)
        colours = rng.integers(0, 256, (7, 7, 3)).repeat(16, 0).repeat(16, 1)
        for number in range(images):
            noise = rng.integers(0, 256, (7, 7, 3)).repeat(16, 0).repeat(16, 1)
            Image.fromarray((0.5 * colours + 0.5 * noise).astype(np.uint8)).save(folder / person / f"{number}.png")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """All six folders: mask of 8 people, children of 6, and races of 5 to 8."""
    folder = tmp_path_factory.mktemp("mfr")
    masked = [f"m{number}" for number in range(8)]
    write_people(folder / "mask" / "plain", masked, 2, 0)
    write_people(folder / "mask" / "masked", masked, 1, 0)
    write_people(folder / "children", [f"c{number}" for number in range(6)], 3, 1)
    for seed, race in enumerate(RACES):
        write_people(folder / race, [f"{race}{number}" for number in range(5 + seed)], 2 + seed % 2, 2 + seed)
    (folder / ".hidden").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "w.safetensors"
    save_file(build_vit("vit_xxt", embedding_size=16).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _few_pairs_resolve_it(monkeypatch):
    """The protocol's own targets need a million pairs."""
    for name in SETS:
        monkeypatch.setitem(mfr.FAR, name, 0.05)


def copy_of(sets: Path, folder: Path, names) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(sets / name)
    return folder


def people(folder: Path) -> list[tuple[str, Path]]:
    """(person, image) of every image below a folder."""
    return [(path.parent.name, path) for path in sorted(folder.rglob("*.png"))]


def expected_pairs(sets: Path, name: str) -> list[tuple[tuple[str, Path], tuple[str, Path]]]:
    if name == "mask":
        return list(itertools.product(people(sets / "mask" / "plain"), people(sets / "mask" / "masked")))
    folders = RACES if name == "mr_all" else (name,)
    return list(itertools.combinations([each for folder in folders for each in people(sets / folder)], 2))


def test_every_set_scores_the_pairs_of_its_protocol_by_the_cosine_of_one_forward(sets, weights):
    assert {name: mfr.FAR[name] for name in SETS} == mfr.FAR
    embedder, results = load_embedder(weights), {}
    parts = mfr.parts_of(read_folder(sets))
    for part in parts:
        results |= mfr.score_part(part, mfr.embed_part(embedder, part))
    everything = [section for part in parts for section in part.sections]
    images = face_images(tuple(everything))
    vectors = embed(embedder, images, mirror=False)[:, 0].astype(np.float64)
    unit = dict(zip(map(Path, images.names), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))
    for name in SETS:
        pairs = expected_pairs(sets, name)
        scores = [float(unit[first[1]] @ unit[second[1]]) for first, second in pairs]
        expected = tar_at_far(scores, np.array([first[0] == second[0] for first, second in pairs]), 0.05)
        found = results[name].tar_at_far
        assert found.threshold == pytest.approx(expected.threshold, abs=1e-6)
        assert (found.tar, found.far, found.genuine, found.impostor) == (expected.tar, expected.far, expected.genuine, expected.impostor)
        assert results[name].identities == len({person for pair in pairs for person, _ in pair})
        assert results[name].images == len({path for pair in pairs for _, path in pair})
    assert len({results[name].tar_at_far.tar for name in SETS}) > 3


def test_the_targets_are_those_published(monkeypatch):
    monkeypatch.undo()
    assert {"mask": 1e-4, "children": 1e-4, **dict.fromkeys((*RACES, "mr_all"), 1e-6)} == mfr.FAR


def test_run_prints_and_writes_every_set_and_the_score(sets, weights, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["mfr", "run", "--model", str(weights), "--data", str(sets), "--json", str(out), "--state", str(tmp_path / "state")]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    (entry,) = read_results([out])  # report and table read what is written
    assert {name: point.tar for name, point in entry.result.sets.items()} == {name: each["tar"] for name, each in record["sets"].items()}
    assert (record["protocol"], record["input_range"]) == ("mfr", "-1..1")
    assert list(record["sets"]) == list(mfr.FAR)
    for name, numbers in record["sets"].items():
        assert {"tar", "far", "far_target", "threshold", "images", "identities", "genuine", "impostor"} == set(numbers)
        assert f"{name:<12} TAR@FAR=5e-02 {100 * numbers['tar']:.3f} %" in printed
    assert record["score"] == pytest.approx(0.25 * record["sets"]["mask"]["tar"] + 0.75 * record["sets"]["mr_all"]["tar"])
    assert record["sets"]["mask"]["images"] == 24
    assert record["sets"]["mask"]["genuine"] == 16
    assert list((tmp_path / "state").iterdir()) == []  # progress is dropped once the result is on the disk


def test_sets_that_are_absent_are_named_and_null(sets, weights, tmp_path, capsys):
    folder, out = copy_of(sets, tmp_path / "some", ["children", "african", "east_asian"]), tmp_path / "out.json"
    assert main(["mfr", "run", "--model", str(weights), "--data", str(folder), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mask         absent: no folder mask\n" in printed
    assert "caucasian    absent: no folder caucasian\n" in printed
    assert "mr_all       absent: needs all four races: no folder caucasian, south_asian\n" in printed
    record = json.loads(out.read_text())
    assert {name for name, numbers in record["sets"].items() if numbers is None} == {"mask", "caucasian", "south_asian", "mr_all"}
    assert record["score"] is None


def test_an_estimate_measures_says_and_writes_nothing(sets, weights, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--json", str(out), "--estimate", "--state", str(tmp_path / "state"), "--batch-size", "8"]
    assert main(["mfr", "run", "--model", str(weights), "--data", str(sets), *arguments]) == 0
    printed = capsys.readouterr().out
    parts = mfr.parts_of(read_folder(sets))
    assert f"\n{sum(len(part.images.labels) for part in parts)} images at " in printed
    num_pairs = sum(len(expected_pairs(sets, name)) for name in ("mask", "children", "mr_all"))  # a race's pairs are among mr_all's
    assert f"\n{num_pairs:,} pairs at " in printed
    assert "in all " in printed
    assert not out.exists()
    assert not (tmp_path / "state").exists()


def test_an_interrupted_run_goes_on_with_what_was_scored(sets, weights, tmp_path, monkeypatch, capsys):
    command = ["mfr", "run", "--model", str(weights), "--data", str(sets), "--state", str(tmp_path / "state")]
    assert main(command) == 0
    whole = capsys.readouterr().out

    def interrupt(part, *args, **kwargs):
        if part.name == "races":
            raise KeyboardInterrupt
        return score_part(part, *args, **kwargs)

    score_part = mfr.score_part
    monkeypatch.setattr(mfr, "score_part", interrupt)
    assert main(command) == 130
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["children.safetensors", "mask.safetensors"]
    monkeypatch.setattr(mfr, "score_part", score_part)
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == whole
    # Progress of another question is refused.
    monkeypatch.setattr(mfr, "score_part", interrupt)
    assert main(command) == 130
    monkeypatch.setitem(mfr.FAR, "mask", 0.1)
    assert main(command) == 2
    assert "mask.safetensors: is the progress of another scoring: comparisons differ; delete it" in capsys.readouterr().err


# --- what is refused


def add(path: Path, content: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top: add(top / "indian" / "p" / "0.png"), "expected folders named mask, children, african, .*, found indian"),
        (lambda top: add(top / "readme.txt"), r"readme\.txt: expected folders alone here, found a file"),
        (lambda top: add(top / "african" / "list.txt"), r"african/list\.txt: expected folders alone here, found a file"),
        (lambda top: add(top / "african" / "p" / "notes.txt"), r"african/p/notes\.txt: expected an image, \.jpg, \.png, \.jpeg"),
        (lambda top: add(top / "african" / "p" / "x.png" / "y.png"), r"african/p/x\.png: expected an image"),
        (lambda top: (top / "african" / "p").mkdir(), "african/p: an identity without an image"),
        (lambda top: (top / "children").mkdir(), "children: expected a folder for each identity, found nothing"),
        (lambda top: add(top / "mask" / "plain" / "p" / "0.png"), "mask: expected the folders plain and masked, found plain"),
        (lambda top: (top / "mask").mkdir(), "mask: expected the folders plain and masked, found nothing"),
        (lambda top: add(top / "caucasian" / "african0" / "0.png"), "african/african0 and .*caucasian/african0: one identity in two races"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(tmp_path, change, message):
    write_people(tmp_path / "african", ["african0", "african1"], 2, 0)
    read_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(EvalError, match=message):
        read_folder(tmp_path)


def test_a_folder_with_none_of_the_sets_or_none_at_all_is_refused(tmp_path):
    with pytest.raises(EvalError, match="found none of them"):
        read_folder(tmp_path)
    with pytest.raises(EvalError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere")


def test_a_far_that_the_pairs_cannot_resolve_is_refused_before_the_model_is_opened(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    assert main(["mfr", "run", "--model", str(tmp_path / "none.onnx"), "--data", str(sets)]) == 2
    assert "error: mask: TAR@FAR=0.0001 needs at least 1 genuine and 10000 impostor pairs, found 16 and 112" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_and_a_state_that_cannot_be_are_refused(sets, weights, tmp_path, capsys):
    command = ["mfr", "run", "--model", str(weights), "--data", str(sets)]
    assert main([*command, "--device", "cuda"]) == 2
    assert "--device cuda: there is no GPU" in capsys.readouterr().err
    assert main([*command, "--state", str(tmp_path / "no" / "where")]) == 2
    assert "no/where: no such folder: " in capsys.readouterr().err


# --- packages


def test_check_package_prints_each_rule_and_its_exit_code_tells(tmp_path, capsys):
    onnx.save(tiny_model(), tmp_path / "good.onnx")
    assert main(["mfr", "check-package", str(tmp_path / "good.onnx")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in printed[:-1])
    assert printed[-1].endswith("good.onnx: keeps all 13 rules")
    onnx.save(tiny_model(embedding_size=600), tmp_path / "bad.onnx")
    assert main(["mfr", "check-package", str(tmp_path / "bad.onnx")]) == 2
    captured = capsys.readouterr()
    assert "failed  embedding size  expected at most 512, equal in every batch; found 600" in captured.out
    assert captured.err.endswith("bad.onnx: keeps 12 of 13 rules, not embedding size\n")
