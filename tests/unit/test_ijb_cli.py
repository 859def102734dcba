"""``python -m eval ijb`` from files to numbers: what it prints and writes, and how it fails."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.synthetic import draw_face
from eval.__main__ import main
from eval.cache import image_digest
from eval.decoding import decode_ahead
from eval.embedder import load_embedder
from eval.errors import EvalError
from eval.ijb_meta import read_templates
from eval.images import FaceImages
from eval.report import sections
from eval.results import read_results
from model.vit import build_vit
from tests import reference_ijb as reference
from tests.ijb_sets import PEOPLE, write_ijb

MODES = {f"N{n}D{d}F{f}": (n, d, f) for n in (1, 0) for d in (1, 0) for f in (1, 0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and a set: (arguments that work, folder of the set)."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save_file(build_vit("vit_xxt", embedding_size=16).state_dict(), folder / "w.safetensors")
    write_ijb(folder / "set")
    return ["ijb", "--model", f"{folder}/w.safetensors", "--data", f"{folder}/set"], folder / "set"


@pytest.fixture(scope="module")
def expected(made):
    """Mode -> template id -> vector, by the reference from the embeddings of faces that were aligned one by one."""
    arguments, root = made
    embedder, images = load_embedder(arguments[2]), read_templates(root, "IJBC").images
    of_image = {}
    scores = {line.split()[0]: float(line.split()[-1]) for line in (root / "meta/ijbc_name_5pts_score.txt").read_text().splitlines()}
    for number, path in enumerate(images.names):
        face = images.decode(number)
        views = embedder(np.stack([face, face[:, ::-1]]))
        of_image[Path(path).name] = (*views.tolist(), scores[Path(path).name])
    members = [(name, int(t), int(m)) for name, t, m in map(str.split, (root / "meta/ijbc_face_tid_mid.txt").read_text().splitlines())]
    return {mode: reference.pooled(of_image, members, *switches) for mode, switches in MODES.items()}


def test_every_number_of_every_mode_is_the_reference_s(made, expected, tmp_path, capsys):
    arguments, root = made
    assert main([*arguments, "--json", f"{tmp_path}/out.json"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    (section,) = sections(read_results([tmp_path / "out.json"]))  # report and table read what is written
    assert len(section.rows) == 2 * len(record["modes"])
    assert [model.curves.model_dump() for model in section.models] == [record["curves"]]
    assert {key: record[key] for key in ("protocol", "target", "compared", "default_mode", "images", "templates")} == {
        "protocol": "ijb", "target": "IJBC", "compared": "both", "default_mode": "N1D1F1", "images": 180, "templates": 36
    }  # fmt: skip
    pairs = [tuple(map(int, line.split())) for line in (root / "meta/ijbc_template_pair_label.txt").read_text().splitlines()]
    assert (record["genuine"], record["impostor"]) == (36, 594)
    assert record["unresolved_far"] == [1e-6, 1e-5, 1e-4, 1e-3]
    probes = {10 * p + k: p for p in range(PEOPLE) for k in (1, 2, 3) if p >= 8 or k > 1}
    galleries = {name: {10 * p + 1: p for p in people} for name, people in (("G1", range(4)), ("G2", range(4, 8)))}
    assert list(record["modes"]) == list(MODES)
    for mode, vectors in expected.items():
        scores = [(reference.dot(vectors[a], vectors[b]), label) for a, b, label in pairs]
        genuine, impostor = ([score for score, same in scores if same == label] for label in (1, 0))
        found = record["modes"][mode]
        assert [point["far"] for point in found["strict"]] == [point["far"] for point in found["nearest"]] == [0.01, 0.1]
        for strict, nearest in zip(found["strict"], found["nearest"], strict=True):
            tar, threshold, reached = reference.strict_tar(genuine, impostor, strict["far"])
            assert (strict["tar"], strict["reached_far"], strict["threshold"]) == (tar, reached, pytest.approx(threshold, abs=1e-5))
            assert (nearest["tar"], nearest["reached_far"]) == reference.nearest_tar(genuine, impostor, nearest["far"])
        for gallery in found["search"]["galleries"]:
            ranks, tpir = reference.searched(vectors, galleries[gallery["gallery"]], probes, (1, 5, 10), (0.1,))
            assert gallery["ranks"] == {str(k): share for k, share in ranks.items()}
            assert {point["fpir"]: point["tpir"] for point in gallery["tpir"]} == tpir
            assert gallery["unresolved_fpir"] == [0.01]
            assert (gallery["templates"], gallery["mated"], gallery["impostors"]) == (4, 8, 20)
    curves = record["curves"]
    assert (curves["genuine"], sum(curves["genuine_counts"]), sum(curves["impostor_counts"])) == (36, 36, 594)
    _check_print(capsys.readouterr(), record)


def _check_print(captured, record: dict) -> None:
    lines = captured.out.splitlines()
    assert "IJBC: 180 images in 36 templates, embeddings of 16" in lines
    assert "1:1, 630 pairs: 36 genuine, 594 impostor" in lines
    for mode, found in record["modes"].items():
        rows = [line.split() for line in lines if line.startswith(f"{mode} ")][:3]
        for row, reading in zip(rows, ("strict", "nearest"), strict=False):
            assert row == [mode, "-", "-", "-", "-", *(f"{100 * point['tar']:.2f}" for point in found[reading])]
        means = found["search"]
        tpir = [f"{100 * means['mean_tpir']['0.1']:.2f}"]
        assert rows[2] == [mode, "mean", *(f"{100 * share:.2f}" for share in means["mean_ranks"].values()), "-", *tpir]
    assert "FAR 1e-06 not resolved: needs 1000000 impostor pairs" in lines
    assert "G2: FPIR 0.01 not resolved: needs 100 probes without a mate" in lines
    assert "180/180 images, " in captured.err
    assert " pairs scored in N0D0F0, " in captured.err


@pytest.mark.parametrize(("protocol", "absent"), [("1:1", "rank-1"), ("1:N", "TAR")])
def test_one_protocol_alone_needs_only_its_own_files(made, tmp_path, capsys, protocol, absent):
    arguments, root = made
    (tmp_path / "set/meta").mkdir(parents=True)
    (tmp_path / "set/loose_crop").symlink_to(root / "loose_crop")
    for path in (root / "meta").iterdir():
        if ("1N" in path.name) <= (protocol == "1:N") and ("pair" not in path.name or protocol == "1:1"):
            (tmp_path / "set/meta" / path.name).symlink_to(path)
    words = [*arguments[:3], "--data", f"{tmp_path}/set", "--protocol", protocol, "--json", f"{tmp_path}/out.json"]
    assert main(words) == 0
    assert absent not in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert ("curves" in record) == bool(record["modes"]["N1D1F1"]["strict"]) == (protocol == "1:1")
    assert (record["modes"]["N1D1F1"]["search"] is None) == (protocol == "1:1")


def test_what_is_wrong_is_one_line_and_exit_code_2_and_nothing_is_written(made, tmp_path, capsys):
    arguments, root = made
    assert main([*arguments, "--target", "IJBB", "--json", f"{tmp_path}/out.json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: {root}/meta/ijbb_face_tid_mid.txt: no such file; --data names the folder of IJBB that holds meta and loose_crop\n"
    )
    assert main([*arguments, "--json", f"{tmp_path}/nowhere/out.json"]) == 2
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_none_is_named(made, tmp_path, capsys):
    arguments, _ = made
    write_ijb(tmp_path / "set")
    (tmp_path / "set/loose_crop/7.png").write_bytes(b"no picture")
    assert main([*arguments[:3], "--data", f"{tmp_path}/set"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/set/loose_crop/7.png: not a readable image: ")


def test_a_cache_of_embeddings_tells_landmarks_apart(tmp_path):
    Image.fromarray(draw_face(0, 0, 0)).save(tmp_path / "a.png")
    read = (tmp_path / "a.png").read_bytes
    places = [None, np.zeros((1, 5, 2), np.float32), np.ones((1, 5, 2), np.float32)]
    assert len({image_digest(FaceImages(["a"], lambda image: read(), landmarks), 0) for landmarks in places}) == 3


def test_no_decoder_is_offered_for_faces_that_are_not_aligned(made, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*made[0], "--decoder", "dali"])
    assert "unrecognized arguments: --decoder dali" in capsys.readouterr().err


def test_dali_is_refused_for_images_with_landmarks():
    images = FaceImages(["a"], lambda image: b"", np.zeros((1, 5, 2), np.float32))
    with pytest.raises(
        EvalError, match=r"^DALI decodes aligned faces only, and these are cut out by landmarks; leave --decoder at pillow$"
    ):
        decode_ahead(images, [[0]], "dali", torch.device("cpu"))
