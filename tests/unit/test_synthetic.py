import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.synthetic import draw_face, write_pairs, write_synthetic


def test_a_face_depends_on_seed_identity_and_image_alone():
    face = draw_face(3, 5, 0)
    assert (face.shape, face.dtype) == ((112, 112, 3), np.uint8)
    np.random.default_rng().random(9)
    draw_face(3, 6, 1)
    np.testing.assert_array_equal(draw_face(3, 5, 0), face)
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert np.abs(draw_face(*other).astype(int) - face).mean() > 3


def test_identities_differ_more_than_images_of_one_identity_yet_one_image_does_not_settle_it():
    """Nearest image in plain pixels, on small grey-free thumbnails: far above chance (1 in 30), far from solved."""
    thumbnails = np.array([[Image.fromarray(draw_face(0, i, k)).reduce(8) for k in range(4)] for i in range(30)], float).reshape(30, 4, -1)
    known, asked = thumbnails[:, 0], thumbnails[:, 1:].reshape(90, -1)
    nearest = np.linalg.norm(asked[:, None] - known[None], axis=2).argmin(1)
    accuracy = (nearest == np.repeat(np.arange(30), 3)).mean()
    assert 0.1 < accuracy < 0.9


def test_the_folder_follows_the_naming_of_lfw(tmp_path):
    write_synthetic(tmp_path / "faces", 2, 3, seed=1, first_identity=7)
    found = sorted(str(file.relative_to(tmp_path / "faces")) for file in (tmp_path / "faces").rglob("*.jpg"))
    assert found == [f"id_{i:05d}/id_{i:05d}_{k:04d}.jpg" for i in (7, 8) for k in (1, 2, 3)]
    with Image.open(tmp_path / "faces" / found[4]) as image:
        assert image.size == (112, 112)
        assert np.abs(np.asarray(image, int) - draw_face(1, 8, 1)).mean() < 12


def test_an_existing_folder_and_bad_counts_are_refused(tmp_path):
    write_synthetic(tmp_path / "faces", 1, 1, seed=0)
    with pytest.raises(DataError, match="faces: exists already"):
        write_synthetic(tmp_path / "faces", 1, 1, seed=0)
    with pytest.raises(DataError, match="images: must be at least 1, got 0"):
        write_synthetic(tmp_path / "none", 1, 0, seed=0)
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match="images: must be at least 1, got -1"):
        write_pairs(tmp_path / "pairs.txt", 20, -1, 2, 1, seed=0)
    with pytest.raises(DataError, match="seed: must be at least 0, got -1"):
        write_pairs(tmp_path / "pairs.txt", 20, 4, 2, 1, seed=-1)


def test_pairs_are_in_lfw_format_distinct_and_share_no_identity_between_folds(tmp_path):
    write_pairs(tmp_path / "pairs.txt", 20, 4, 4, 12, seed=2, first_identity=100)
    first, *lines = (tmp_path / "pairs.txt").read_text().splitlines()
    assert first == "4\t12"
    assert len(set(lines)) == len(lines) == 4 * 2 * 12
    people = []
    for fold in range(4):
        rows = [line.split("\t") for line in lines[fold * 24 : fold * 24 + 24]]
        assert [len(row) for row in rows] == [3] * 12 + [4] * 12
        assert all(1 <= int(i) < int(j) <= 4 for _, i, j in rows[:12])
        assert all(a != b and min(int(i), int(j)) >= 1 and max(int(i), int(j)) <= 4 for a, i, b, j in rows[12:])
        people.append({row[0] for row in rows} | {row[2] for row in rows[12:]})
    assert all(name[:3] == "id_" and 100 <= int(name[3:]) < 120 for fold in people for name in fold)
    assert sum(map(len, people)) == len(set().union(*people))


def test_too_many_pairs_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"pairs\.txt: 10 folds of 300 \+ 300 pairs: of 20 identities a fold has 2 for itself"):
        write_pairs(tmp_path / "pairs.txt", 20, 4, 10, 300, seed=0)
