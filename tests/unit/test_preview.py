"""The sheet of ``python -m data_pipeline preview``: its tiles are the loader's pixels, and it is complete or absent."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.augment import NUM_DRAWS, Augment
from data_pipeline.errors import DataError
from data_pipeline.order import uniforms
from data_pipeline.preview import MODERATE, preview
from tests.unit.record_sets import jpeg, write_records

CHANGES = ["downscale", "blur", "color", "gray", "brightness", "shift_px", "erase", "flip"]
RECIPE = "output: none\nstages: [{name: only, epochs: 1}]\ndata: {path: none, augment: {flip: 0, gray: 0.3, shift_px: 2}}\n"


def tiles(sheet, changes):
    """[columns, rows, 112, 112, 3] of a sheet with so many changes."""
    pixels = np.asarray(Image.open(sheet))
    lefts = [16, *(150 + 118 * i for i in range(changes)), *(150 + 118 * changes + 16 * (changes > 0) + 118 * i for i in range(4))]
    rows = (len(pixels) - 98 + 6) // 118
    assert pixels.shape == (98 - 6 + 118 * rows, lefts[-1] + 112 + 16, 3)
    return np.array([[pixels[82 + 118 * row :][:112, left : left + 112] for row in range(rows)] for left in lefts])


@pytest.fixture(scope="module")
def moderate(face_set, tmp_path_factory):
    """Numbers of the faces in the rows of a sheet, their pixels, and what each column shows by its title."""
    folder, faces = face_set
    out = tmp_path_factory.mktemp("sheet") / "sheet.png"
    names = preview(folder, out, MODERATE, images=5, seed=1)
    numbers = [int(name.partition("(key ")[2][:-1]) for name in names]
    titles = ["as stored", *CHANGES, *(f"draw {i}" for i in range(1, 5))]
    return numbers, faces[numbers], dict(zip(titles, tiles(out, 8), strict=True))


def test_the_first_column_shows_the_images_as_stored(moderate):
    numbers, stored, columns = moderate
    assert len(set(numbers)) == 5
    assert np.array_equal(columns["as stored"], stored)


def test_each_change_stands_alone_in_its_column_and_is_made_on_every_image(moderate):
    _, stored, columns = moderate
    for row, face in enumerate(stored):
        shown = {name: columns[name][row] for name in CHANGES}
        assert np.array_equal(shown["flip"], face[:, ::-1])
        luma = np.asarray(Image.fromarray(face).convert("L"), int)
        assert np.abs(shown["gray"] - luma[:, :, None]).max() <= 1
        erased = (shown["erase"] != face).any(axis=2)
        assert 0.01 < erased.mean() < 0.21
        assert (shown["erase"][erased] == 127).all()
        moves = [(down, right) for down in range(-6, 7) for right in range(-6, 7)]
        inner = shown["shift_px"][6:-6, 6:-6]
        assert any(np.array_equal(inner, face[6 + down : 106 + down, 6 + right : 106 + right]) for down, right in moves)
        dark = (face > 40) & (face < 200)
        factor = shown["brightness"][dark] / face[dark]
        assert 0.78 < factor.mean() < 1.22
        assert np.ptp(factor) < 1.1 / 40
        for name in ("downscale", "blur"):
            assert 1 < np.abs(shown[name] - face.astype(float)).mean() < 20
            assert np.abs(shown[name].mean(axis=(0, 1)) - face.mean(axis=(0, 1))).max() < 1
        assert 1 < np.abs(shown["color"] - face.astype(float)).mean() < 50
        assert np.abs(np.asarray(Image.fromarray(shown["color"]).convert("L"), int) - luma).mean() < 5


def test_draws_are_those_of_epochs_one_after_the_other(face_set, tmp_path):
    preview(face_set[0], tmp_path / "a.png", Augment(flip=0.5), images=6, seed=4)
    stored, mirrored, *draws = tiles(tmp_path / "a.png", 1)
    assert np.array_equal(mirrored, stored[:, :, ::-1])
    for epoch, draw in enumerate(draws):
        flipped = Augment(flip=0.5).draw(uniforms(4, epoch, np.arange(6), NUM_DRAWS))["flip"]
        expected = np.where(flipped[:, None, None, None], mirrored, stored)
        assert np.array_equal(draw, expected)


def test_the_seed_chooses_images_and_draws(face_set, tmp_path):
    folder, _ = face_set
    one, two, other = (preview(folder, tmp_path / f"{i}.png", MODERATE, images=3, seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert one == two != other
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_what_a_recipe_leaves_out_has_no_column(face_set, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert main(["preview", str(face_set[0]), str(tmp_path / "a.png"), "--config", str(tmp_path / "recipe.yaml"), "--images", "2"]) == 0
    stored, gray, shift, *draws = tiles(tmp_path / "a.png", 2)
    assert (np.ptp(gray, axis=3) == 0).all()
    assert (np.ptp(shift, axis=3) > 0).any()
    assert len(draws) == 4
    preview(face_set[0], tmp_path / "b.png", Augment(flip=0.0), images=2)
    for column in tiles(tmp_path / "b.png", 0)[1:]:
        assert np.array_equal(column, stored)


@pytest.mark.parametrize("order", ["set out override config", "set out config override", "config set out override"])
def test_overrides_change_the_recipe_wherever_they_stand(face_set, tmp_path, capsys, order):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = {
        "set": [str(face_set[0])],
        "out": [str(tmp_path / "a.png")],
        "override": ["data.augment.gray=0", "data.augment.flip=1"],
        "config": ["--config", str(tmp_path / "recipe.yaml"), "--images", "2"],
    }
    assert main(["preview", *(word for name in order.split() for word in words[name])]) == 0
    stored, _, flipped, *_ = tiles(tmp_path / "a.png", 2)  # shift_px and flip
    assert np.array_equal(flipped, stored[:, :, ::-1])
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'a.png'}: 2 images of {face_set[0]}")
    assert len(rows) == 2
    assert all("train.rec offset" in row for row in rows)


def test_without_a_recipe_every_change_is_shown_and_can_be_overridden(face_set, tmp_path):
    command = ["preview", str(face_set[0]), str(tmp_path / "a.png"), "--images", "2"]
    assert main(command) == 0
    tiles(tmp_path / "a.png", len(CHANGES))
    assert main([*command, "--force", "data.augment.erase=0"]) == 0
    tiles(tmp_path / "a.png", len(CHANGES) - 1)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["gone", "a.png"], "gone: expected a folder with a set"),
        (["set", "a.gif"], "a.gif: expected a name that ends in .png or .jpg"),
        (["set", "folder.png"], "folder.png: is a folder"),
        (["set", "old.png"], "old.png: exists already; give --force to replace it"),
        (["set", "a.png", "--images", "25"], "--images 25: must lie in [1, 24], the number of images in"),
        (["set", "a.png", "--images", "0"], "--images 0: must lie in [1, 24]"),
        (["set", "a.png", "data.augment.blur=2"], "data.augment.blur: must lie in [0, 1], got 2 (command line)"),
        (["set", "a.png", "data.augment.blurr=1"], "data.augment.blurr: unknown key; did you mean blur?"),
        (["set", "a.png", "--config", "gone"], "no such file: "),
        (["set", "a.png", "--seed", "-1"], "--seed -1: must be at least 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(face_set, tmp_path, capsys, words, complaint):
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    paths = {"set": face_set[0], **{name: tmp_path / name for name in ("gone", "a.png", "a.gif", "folder.png", "old.png")}}
    assert main(["preview", *(str(paths.get(word, word)) for word in words)]) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_words_that_no_command_knows_are_refused(face_set, tmp_path):
    for words in (["preview", str(face_set[0]), "a.png", "--imges", "3"], ["info", str(face_set[0]), "data.augment.blur=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)


def test_an_image_that_cannot_be_read_or_decoded_is_named(tmp_path):
    write_records(tmp_path / "train.rec", [(0, 0.0, jpeg(side=96))])
    with pytest.raises(DataError, match=r"train\.rec: record at offset 0 \(key 0\): an image of 96x96 pixels, expected 112x112"):
        preview(tmp_path, tmp_path / "a.png", MODERATE, images=1)
    write_records(tmp_path / "train.rec", [(0, 0.0, jpeg().replace(b"\xff\xdb", b"\xff\xfe"))])  # no quantization table
    with pytest.raises(DataError, match=r"an image cannot be decoded \(.+\): let `python -m data_pipeline verify"):
        preview(tmp_path, tmp_path / "a.png", MODERATE, images=1)
    assert not (tmp_path / "a.png").exists()


def test_a_sheet_that_cannot_take_its_place_leaves_nothing(face_set, tmp_path, monkeypatch):
    def no_space(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        preview(face_set[0], tmp_path / "a.png", Augment(), images=1)
    assert not list(tmp_path.iterdir())


def test_a_jpg_is_smaller_and_close(face_set, tmp_path):
    for name in ("a.png", "a.jpg"):
        preview(face_set[0], tmp_path / name, MODERATE, images=3)
    png, jpg = ((tmp_path / name).read_bytes() for name in ("a.png", "a.jpg"))
    assert len(jpg) < len(png) / 2
    one, two = (np.asarray(Image.open(io.BytesIO(file)), float) for file in (png, jpg))
    assert Image.open(io.BytesIO(jpg)).format == "JPEG"
    assert np.abs(one - two).mean() < 4
