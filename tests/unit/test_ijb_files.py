"""The files of an IJB set: what is read from them, and one line for each way in which they can be wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from eval.errors import EvalError
from eval.ijb_meta import read_search, read_templates
from eval.ijb_pairs import read_pairs
from tests.ijb_sets import FRAMES, PEOPLE, STILLS, TEMPLATES_EACH, write_ijb

MEMBERS, POINTS, PAIRS = "face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("ijb") / "IJBC"
    return root, write_ijb(root)


@pytest.fixture
def root(whole, tmp_path) -> Path:
    """A copy whose texts may be changed."""
    copy = tmp_path / "IJBC"
    (copy / "meta").mkdir(parents=True)
    for path in (whole[0] / "meta").iterdir():
        (copy / "meta" / path.name).write_bytes(path.read_bytes())
    (copy / "loose_crop").symlink_to(whole[0] / "loose_crop")
    return copy


def text(root: Path, name: str) -> Path:
    return root / "meta" / f"ijbc_{name}"


def change(root: Path, name: str, line: int, pattern: str, replacement: str) -> None:
    lines = text(root, name).read_text().split("\n")
    lines[line - 1], count = re.subn(pattern, replacement, lines[line - 1], count=1)
    assert count
    text(root, name).write_text("\n".join(lines))


def read_all(root: Path) -> tuple:
    templates = read_templates(root, "IJBC")
    return templates, read_pairs(root, "IJBC", templates), read_search(root, "IJBC", templates)


def test_templates_media_scores_and_landmarks_are_those_of_the_files(whole):
    root, _ = whole
    templates = read_templates(root, "IJBC")
    assert len(templates.images) == PEOPLE * TEMPLATES_EACH * (STILLS + FRAMES)
    assert templates.ids.tolist() == sorted(10 * person + number for person in range(PEOPLE) for number in (1, 2, 3))
    lines = [line.split() for line in text(root, MEMBERS).read_text().splitlines()]
    found = zip(templates.image.tolist(), templates.template.tolist(), templates.media.tolist(), strict=True)
    assert {(Path(templates.images.names[i]).name, str(templates.ids[t]), str(m)) for i, t, m in found} == set(map(tuple, lines))
    scores = {line.split()[0]: float(line.split()[-1]) for line in text(root, POINTS).read_text().splitlines()}
    assert {Path(name).name: score for name, score in zip(templates.images.names, templates.scores.tolist(), strict=True)} == scores
    assert (np.diff(templates.template) >= 0).all()


def test_faces_are_cut_out_as_they_were_drawn(whole):
    root, faces = whole
    images = read_templates(root, "IJBC").images
    for image in range(20):
        difference = np.abs(images.decode(image).astype(int) - faces[Path(images.names[image]).name])
        assert np.median(difference) <= 1  # landmarks have four decimals, and the warp's grid is 1/32 pixel


def test_pairs_are_those_of_the_file_in_any_order(whole):
    root, _ = whole
    templates, pairs, _ = read_all(root)
    expected = {(*sorted(map(int, line.split()[:2])), int(line.split()[2])) for line in text(root, PAIRS).read_text().splitlines()}
    found = zip(templates.ids[pairs.first].tolist(), templates.ids[pairs.second].tolist(), pairs.same.tolist(), strict=True)
    assert set(found) == expected
    assert (pairs.first.dtype, pairs.second.dtype, pairs.repeated) == (np.int32, np.int32, 0)
    assert (np.diff(pairs.first) >= 0).all()


def test_galleries_and_probes_are_those_of_the_files(whole):
    templates, _, search = read_all(whole[0])
    first, second = search.galleries
    assert (first.name, second.name) == ("G1", "G2")
    assert (templates.ids[first.templates].tolist(), first.subjects.tolist()) == ([1, 11, 21, 31], [0, 1, 2, 3])
    assert (templates.ids[second.templates].tolist(), second.subjects.tolist()) == ([41, 51, 61, 71], [4, 5, 6, 7])
    assert len(search.probes.templates) == PEOPLE * TEMPLATES_EACH - 8


def test_ijbb_has_its_own_names(tmp_path):
    write_ijb(tmp_path, "IJBB")
    templates = read_templates(tmp_path, "IJBB")
    assert len(read_pairs(tmp_path, "IJBB", templates).first)
    assert [gallery.name for gallery in read_search(tmp_path, "IJBB", templates).galleries] == ["S1", "S2"]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 23])
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda data: data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b" ", b"\t"),
        lambda data: data.replace(b" ", b"   "),
        lambda data: data.replace(b"\n", b" \n"),
        lambda data: data.rstrip(),
        lambda data: data + b"\n \r\n\n",
    ],
)
def test_pairs_are_the_same_however_lines_end_and_fields_are_parted(whole, root, monkeypatch, chunk, rewrite):
    expected = read_all(whole[0])[1]
    text(root, PAIRS).write_bytes(rewrite(text(root, PAIRS).read_bytes()))
    monkeypatch.setattr("eval.ijb_pairs.CHUNK_BYTES", chunk)
    done = []
    found = read_pairs(root, "IJBC", read_templates(root, "IJBC"), lambda *progress: done.append(progress))
    for name in ("first", "second", "same"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert done[-1] == (text(root, PAIRS).stat().st_size,) * 2


def test_files_with_carriage_returns_read_the_same(whole, root):
    for path in (root / "meta").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    (templates, pairs, search), (found, found_pairs, found_search) = read_all(whole[0]), read_all(root)
    np.testing.assert_array_equal(found.images.landmarks, templates.images.landmarks)
    np.testing.assert_array_equal(found.media, templates.media)
    np.testing.assert_array_equal(found_pairs.same, pairs.same)
    np.testing.assert_array_equal(found_search.probes.templates, search.probes.templates)


def test_lines_of_landmarks_may_stand_in_any_order_and_be_too_many(whole, root):
    lines = text(root, POINTS).read_text().splitlines()
    text(root, POINTS).write_text("\n".join([lines[0].replace("1.png", "unused.png"), *lines[::-1]]))
    expected, found = read_templates(whole[0], "IJBC"), read_templates(root, "IJBC")
    np.testing.assert_array_equal(found.images.landmarks, expected.images.landmarks)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert (expected.unused, found.unused) == (0, 1)


def test_a_pair_that_comes_again_is_counted(root):
    with text(root, PAIRS).open("a") as file:
        file.write("1 11 0\n11 1 0\n")  # 11 1 0 is there already
    pairs = read_all(root)[1]
    assert pairs.repeated == 2
    assert len(pairs.same) == PEOPLE * TEMPLATES_EACH * (PEOPLE * TEMPLATES_EACH - 1) // 2 + 2


WRONG = [  # file, line, what is replaced there, by what, what is said after "FILE, line N: "
    (MEMBERS, 3, r" \d+$", "", "expected image template media (3 fields), found 2: '3.png 1'"),
    (MEMBERS, 3, r" 1 ", " 1 1 ", "expected image template media (3 fields), found 4: "),
    (MEMBERS, 3, r" 1 ", " -1 ", "expected the number of a template, found '-1'"),
    (MEMBERS, 3, r"\d+$", "1_0", "expected the number of a media, found '1_0'"),
    (MEMBERS, 3, r"\d+$", "9" * 19, "expected the number of a media, found '9999999999999999999'"),
    (MEMBERS, 3, r"^3", "x", "no landmarks for 'x.png'; expected a line of it in ijbc_name_5pts_score.txt"),
    (MEMBERS, 3, r"^3", "2", "image '2.png' in template 1 again, as in line 2"),
    (MEMBERS, 3, r".*", "", "an empty line, with others after it"),
    (POINTS, 4, r" \S+$", "", "expected image x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score (12 fields), found 11: '4.png "),
    (POINTS, 4, r"\S+$", "high", "expected image x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score: could not convert string to float: 'high'"),
    (POINTS, 4, r"\S+$", "nan", "expected a finite score of the detector, 0 or more, found nan"),
    (POINTS, 4, r"\S+$", "-0.5", "expected a finite score of the detector, 0 or more, found -0.5"),
    (POINTS, 4, r" \S+ ", " inf ", "expected five finite landmarks that place a face, found [[inf, "),
    (POINTS, 4, r"png .*", "png 5 5 5 5 5 5 5 5 5 5 0.9", "expected five finite landmarks that place a face, found [[5.0, 5.0], "),
    (POINTS, 4, r"^4", "3", "image '3.png' again, first in line 3; expected each once"),
    (POINTS, 4, r"^4", "../4", "'../4.png' can't be the name of an image in loose_crop"),
    (PAIRS, 5, r" \d$", "", "expected template template label (3 fields), found 2: '"),
    (PAIRS, 5, r"$", " 1", "expected template template label (3 fields), found 4: '"),
    (PAIRS, 5, r".*", "", "expected template template label (3 fields), found 0: ''"),
    (PAIRS, 5, r"\d$", "2", "expected label 1 (one person) or 0 (two), found '11 2 2'"),
    (PAIRS, 5, r"\d$", "-1", "expected the number of a label, found '-1'"),
    (PAIRS, 5, r"^\d+", "404", "expected templates that have images in the file face_tid_mid.txt, found '404 2 0'"),
    (PAIRS, 5, r"^\d+", "2", "expected two templates, not one paired with itself, found '2 2 0'"),
    (PAIRS, 5, r".*", "2 1 0", "the two templates of line 1; expected no pair with both labels, found one"),
    (PAIRS, 5, r"^", "\x00", "expected the number of a template, found '\\x0011'"),
    ("1N_gallery_G1.csv", 1, r".*", "1,0,a.jpg", "expected a header such as TEMPLATE_ID,SUBJECT_ID,..., found '1,0,a.jpg'"),
    ("1N_gallery_G1.csv", 4, r".*", "11", "expected template,subject,..., found '11'"),
    ("1N_gallery_G1.csv", 4, r"^11", "x", "expected the number of a template, found 'x'"),
    ("1N_gallery_G1.csv", 5, r"^11,1", "11,2", "template 11 is of subject 2 here, and of 1 in line 4"),
    ("1N_gallery_G1.csv", 4, r"^11,1", "404,1", "template 404 has no images in the file face_tid_mid.txt"),
]


@pytest.mark.parametrize(("name", "line", "pattern", "replacement", "message"), WRONG)
@pytest.mark.parametrize("chunk", [20, 1 << 23])
def test_a_wrong_line_is_named_with_what_was_expected_and_found(root, monkeypatch, name, line, pattern, replacement, message, chunk):
    change(root, name, line, pattern, replacement)
    monkeypatch.setattr("eval.ijb_pairs.CHUNK_BYTES", chunk)
    with pytest.raises(EvalError, match="^" + re.escape(f"{text(root, name)}, line {line}: {message}")) as raised:
        read_all(root)
    assert "\n" not in str(raised.value)


def test_an_image_that_is_not_there_is_named_before_anything_is_embedded(whole, root):
    (root / "loose_crop").unlink()
    (root / "loose_crop").mkdir()
    for path in (whole[0] / "loose_crop").iterdir():
        if path.name != "3.png":
            (root / "loose_crop" / path.name).symlink_to(path)
    message = f"{root}/loose_crop/3.png: no such image (asked for by {text(root, MEMBERS)}, line 3)"
    with pytest.raises(EvalError, match=f"^{re.escape(message)}$"):
        read_templates(root, "IJBC")


@pytest.mark.parametrize("name", [MEMBERS, POINTS, PAIRS, "1N_gallery_G1.csv", "1N_gallery_G2.csv", "1N_probe_mixed.csv"])
def test_a_file_that_is_missing_or_empty_is_named(root, name):
    text(root, name).write_bytes(b"")
    with pytest.raises(EvalError, match=f"^{re.escape(str(text(root, name)))}: (the file is empty|no template below the header)"):
        read_all(root)
    text(root, name).unlink()
    with pytest.raises(EvalError, match=f"^{re.escape(str(text(root, name)))}: no such file; --data names the folder of IJBC that holds"):
        read_all(root)


def test_without_the_folder_of_images_it_is_named(root):
    (root / "loose_crop").unlink()
    with pytest.raises(EvalError, match=f"^{re.escape(str(root / 'loose_crop'))}: no readable folder of images: "):
        read_templates(root, "IJBC")


def test_pairs_of_one_label_are_refused(root):
    text(root, PAIRS).write_text("1 11 0\n2 11 0\n")
    with pytest.raises(EvalError, match=r": all 2 pairs have label 0; expected pairs of one person and of two$"):
        read_all(root)


def test_a_subject_twice_in_a_gallery_and_a_probe_that_is_enrolled_are_refused(root):
    with text(root, "1N_gallery_G1.csv").open("a") as file:
        file.write("12,1,b.jpg,1,2,3,4\n")
    with pytest.raises(EvalError, match=r"1N_gallery_G1\.csv: subject 1 has 2 templates, \[11, 12\]; expected one in a gallery$"):
        read_all(root)
    change(root, "1N_gallery_G1.csv", len(text(root, "1N_gallery_G1.csv").read_text().splitlines()), "^12,1", "12,77")
    with pytest.raises(EvalError, match=r"1N_probe_mixed\.csv: template 12 is in ijbc_1N_gallery_G1\.csv too: it would find itself$"):
        read_all(root)


def test_a_line_that_was_cut_short_is_refused_and_not_taken_for_another_subject(root):
    path = text(root, "1N_probe_mixed.csv")
    lines = path.read_text().splitlines()
    template, subject = lines[-1].split(",")[:2]
    path.write_text("\n".join([*lines[:-1], f"{template},{subject[:1]}"]))
    expected = rf"1N_probe_mixed\.csv, line {len(lines)}: expected 7 fields, as in line 2, found 2: '{template},{subject[:1]}'$"
    with pytest.raises(EvalError, match=expected):
        read_all(root)


def test_a_mark_of_the_encoding_is_no_part_of_a_file(root, whole):
    for path in (root / "meta").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (templates, pairs, search), (_, plain_pairs, plain_search) = read_all(root), read_all(whole[0])
    assert [Path(name).name for name in templates.images.names[:2]] == [
        line.split()[0] for line in text(whole[0], MEMBERS).read_text().splitlines()[:2]
    ]
    assert (pairs.first.tolist(), pairs.same.tolist()) == (plain_pairs.first.tolist(), plain_pairs.same.tolist())
    assert search.probes.subjects.tolist() == plain_search.probes.subjects.tolist()


def test_a_file_that_is_no_text_is_refused(root):
    text(root, MEMBERS).write_bytes(b"\xff\xfe1 2 3\n")
    with pytest.raises(EvalError, match=r"face_tid_mid\.txt: not a text file in UTF-8: "):
        read_templates(root, "IJBC")
