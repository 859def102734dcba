"""Lists of pairs other than LFW's: which pairs they hold, and what is said of a list that is wrong."""

import numpy as np
import pytest
from PIL import Image

from eval.errors import EvalError
from eval.pair_pack import open_pack, write_pack
from eval.pairs_file import find_pairs


def save(folder, *paths: str) -> None:
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((112, 112, 3), number, np.uint8)).save(folder / path)


def named(folder, pairs) -> list[tuple[str, str, bool]]:
    names = [str(name).removeprefix(f"{folder}/") for name in pairs.images.names]
    return [(names[first], names[second], bool(same)) for (first, second), same in zip(pairs.pairs, pairs.same, strict=True)]


# --- text files


@pytest.fixture
def people(tmp_path):
    """22 images, flat as CALFW's and CPLFW's are: A_1.jpg, B_1.jpg, ..., and A_2.png, ..."""
    save(tmp_path / "images", *(f"{name}_{number}.{'jpg' if number == 1 else 'png'}" for name in "ABCDEFGHIJK" for number in (1, 2)))
    return tmp_path / "images"


GENUINE = [(f"{name}_1.jpg", f"{name}_2.jpg", 1) for name in "ABCDEFGHIJ"]
IMPOSTOR = [(f"{first}_1.jpg", f"{second}_1.jpg", 0) for first, second in zip("ABCDEFGHIJ", "BCDEFGHIJK", strict=True)]


def check_text(people, path, text: str) -> None:
    path.write_text(text)
    pairs = find_pairs(people, path)
    expected = [(first, second.replace("_2.jpg", "_2.png"), bool(same)) for first, second, same in GENUINE + IMPOSTOR]
    assert named(people, pairs) == expected  # .png where the list says .jpg: what was aligned is often saved anew
    assert pairs.fold.tolist() == [number // 2 for number in range(20)]  # ten, contiguous
    assert pairs.named_identities is None
    assert (pairs.source, pairs.origin) == (path, path.name)


@pytest.mark.parametrize("flag", [1, 7])  # CALFW's flags count folds
def test_two_lines_make_a_pair(people, tmp_path, flag):
    lines = [f"{image} {same * flag}" for first, second, same in GENUINE + IMPOSTOR for image in (first, second)]
    check_text(people, tmp_path / "pairs_CALFW.txt", "\n".join(lines) + "\n")
    check_text(people, tmp_path / "pairs_CALFW.txt", "\r\n".join(["", *lines]))


@pytest.mark.parametrize("separator", [",", ", ", "\t", " "])
def test_one_line_is_a_pair_and_its_flag(people, tmp_path, separator):
    check_text(people, tmp_path / "agedb_30.csv", "\n".join(separator.join(map(str, pair)) for pair in GENUINE + IMPOSTOR))


def test_a_pack_of_a_list_is_evaluated_as_the_list_is(people, tmp_path):
    (tmp_path / "agedb_30.txt").write_text("\n".join(" ".join(map(str, pair)) for pair in GENUINE + IMPOSTOR))
    pairs = find_pairs(people, tmp_path / "agedb_30.txt")
    write_pack(pairs, tmp_path / "agedb_30.pairs.safetensors")
    pack = open_pack(tmp_path / "agedb_30.pairs.safetensors")
    assert (pack.pairs.tolist(), pack.same.tolist(), pack.fold.tolist()) == (pairs.pairs.tolist(), pairs.same.tolist(), pairs.fold.tolist())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A_1.jpg A_2.jpg", "line 3: expected 3 fields, as in line 1, found 2"),
        ("A_1.jpg A_2.jpg 2", "line 3: expected 1 for one person or 0 for two at its end, found '2'"),
        ("A_1.jpg A_2.jpg -1", "line 3: expected 1 for one person or 0 for two at its end, found '-1'"),
        ("A_1.jpg A_1.jpg 1", "line 3: an image paired with itself: A_1.jpg$"),
        ("A_2.png A_2.jpg 1", "line 3: an image paired with itself: A_2.png and A_2.jpg"),  # found by another suffix
        ("./A_1.jpg A_1.jpg 1", r"line 3: an image paired with itself: ./A_1.jpg and A_1.jpg"),
        ("B_1.jpg A_1.jpg 1", r"line 12: a pair of two persons, but \S+pairs.txt, line 3 says otherwise of A_1.jpg and B_1.jpg"),
        (f"A_1.jpg A_2.jpg {'1' * 5000}", "line 3: expected 1 for one person or 0 for two at its end, found '1111"),
        ("A_1.jpg Z_1.jpg 0", r"Z_1.jpg: no such image, with suffix .jpg, .png, .jpeg \(asked for by \S+pairs.txt, line 3\)"),
        ("A_1.jpg ../A_2.jpg 1", "line 3: '../A_2.jpg' leads out of the folder of images"),
        ("A_1.jpg /etc/passwd 1", "line 3: '/etc/passwd' leads out of the folder of images"),
    ],
)
def test_a_wrong_line_is_named(people, tmp_path, line, message):
    lines = [" ".join(map(str, pair)) for pair in GENUINE + IMPOSTOR]
    (tmp_path / "pairs.txt").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(EvalError, match=message):
        find_pairs(people, tmp_path / "pairs.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A_1.jpg 1\nA_2.jpg 0\n", "lines 1 and 2: a pair's flags must be equal, found 1 and 0"),
        ("A_1.jpg 1\n\nA_2.jpg 1\nB_1.jpg 0\n", r"two lines make a pair, found 3; the last line, 4, has no partner"),
        ("A_1.jpg same\n", "line 1: expected 0 for two persons, or another number for one at its end, found 'same'"),
        ("A_1.jpg 1\nA_2.jpg 1\n", "pairs.txt: 10 folds of 1 pairs: need at least 2 folds and a pair in each"),
        ("A_1.jpg\n", r"line 1: expected two positive numbers, folds and pairs per class in a fold \(10 300\)"),
        ("", "the file is empty; expected pairs"),
        (f"{'9' * 5000} 300\n", "two lines make a pair, found 1"),
    ],
)
def test_a_list_that_makes_no_pairs_is_refused(people, tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(EvalError, match=message):
        find_pairs(people, tmp_path / "pairs.txt")


def test_pairs_that_are_listed_again_count_each_time_and_are_told(people, tmp_path):
    lines = [" ".join(map(str, pair)) for pair in GENUINE + IMPOSTOR]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    assert find_pairs(people, tmp_path / "pairs.txt").remarks() == []
    first, second, flag = lines[0].split()
    (tmp_path / "pairs.txt").write_text("\n".join([*lines, f"{second} {first} {flag}", lines[0]]))  # in the other order, and as it was
    pairs = find_pairs(people, tmp_path / "pairs.txt")
    assert (len(pairs.pairs), pairs.repeated, pairs.self_pairs) == (22, 2, 0)
    assert pairs.remarks() == [f"{tmp_path}/pairs.txt: 2 of 22 pairs are repeated, and count each time"]


def test_an_image_that_is_listed_by_several_names_is_one(people, tmp_path):
    lines = [" ".join(map(str, pair)) for pair in GENUINE + IMPOSTOR]
    (tmp_path / "pairs.txt").write_text("\n".join([*lines, "./A_1.jpg K_2.png 0", "A_1.png K_2.jpg 0"]))
    pairs = find_pairs(people, tmp_path / "pairs.txt")
    assert len(pairs.images) == 22
    assert pairs.pairs[-1].tolist() == pairs.pairs[-2].tolist()
    assert pairs.repeated == 1


# --- CFP


@pytest.fixture
def cfp(tmp_path):
    """CFP's tree for three people, two frontal images and one profile of each, and three folds of uneven sizes."""
    frontal = [f"{person:03d}/frontal/{number:02d}.jpg" for person in (1, 2, 3) for number in (1, 2)]
    profile = [f"{person:03d}/profile/01.jpg" for person in (1, 2, 3)]
    save(tmp_path / "aligned", *frontal, *profile)
    protocol = tmp_path / "Protocol"
    protocol.mkdir()
    for name, paths in (("Pair_list_F.txt", frontal), ("Pair_list_P.txt", profile)):
        (protocol / name).write_text("".join(f"{number} ../Data/Images/{path}\n" for number, path in enumerate(paths, start=1)))
    folds = {
        "FP": [("1,1\n2,1\n", "1,2\n"), ("3,2\n", "3,1\n4,3\n"), ("5,3\n", "6,1\n")],
        "FF": [("1,2\n", "1,3\n"), ("3,4\n", "4,5\n"), ("5,6\n", "6,1\n2,5\n")],
    }
    for split, pairs in folds.items():
        for number, (same, diff) in enumerate(pairs, start=1):
            folder = protocol / "Split" / split / f"{number:02d}"
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text(same)
            (folder / "diff.txt").write_text(diff)
    return tmp_path / "aligned", protocol / "Split"


def test_cfp_pairs_are_those_of_its_splits(cfp):
    images, split = cfp
    pairs = find_pairs(images, split / "FP")
    assert named(images, pairs) == [
        ("001/frontal/01.jpg", "001/profile/01.jpg", True),
        ("001/frontal/02.jpg", "001/profile/01.jpg", True),
        ("001/frontal/01.jpg", "002/profile/01.jpg", False),
        ("002/frontal/01.jpg", "002/profile/01.jpg", True),
        ("002/frontal/01.jpg", "001/profile/01.jpg", False),
        ("002/frontal/02.jpg", "003/profile/01.jpg", False),
        ("003/frontal/01.jpg", "003/profile/01.jpg", True),
        ("003/frontal/02.jpg", "001/profile/01.jpg", False),
    ]
    assert pairs.fold.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert pairs.origin == "cfp_fp"
    first, second = pairs.identities[pairs.pairs].T
    assert ((first == second) == pairs.same).all()
    assert len(set(pairs.identities.tolist())) == 3
    frontal = find_pairs(images, split / "FF")
    assert named(images, frontal)[-1] == ("001/frontal/02.jpg", "003/frontal/01.jpg", False)
    assert frontal.fold.tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("FP/02/same.txt", "3;2\n", r"same.txt, line 1: expected two numbers i,j, found '3;2'"),
        ("FP/02/same.txt", "\n3,9\n", r"same.txt, line 2: image 9 is in no list; those have the numbers 1 to 3"),
        ("FP/02/same.txt", "3,1\n", r"same.txt, line 1: a pair of one person, but it is 002/frontal/01.jpg and 001/profile/01.jpg"),
        ("FP/02/diff.txt", "3,2\n", r"diff.txt, line 1: a pair of two persons, but it is 002/frontal/01.jpg and 002/profile/01.jpg"),
        ("FP/02/diff.txt", None, r"diff.txt: no such pairs file"),
        ("../Pair_list_P.txt", "1 01.jpg\n", r"Pair_list_P.txt, line 1: expected a number and a path such as .*, found '1 01.jpg'"),
        ("../Pair_list_P.txt", None, r"Pair_list_P.txt: no such pairs file"),
        (
            "../Pair_list_P.txt",
            "1 a/001/profile/01.jpg\n2 a/002/profile/01.jpg\n1 a/001/profile/02.jpg\n",
            r"Pair_list_P.txt, line 3: number 1 again, first in line 1; expected each once",
        ),
        ("FP/02/diff.txt", "", r"diff.txt: the file is empty; expected pairs$"),
    ],
)
def test_what_is_wrong_in_cfp_s_files_is_named(cfp, file, text, message):
    images, split = cfp
    (split / file).unlink()
    if text is not None:
        (split / file).write_text(text)
    with pytest.raises(EvalError, match=message):
        find_pairs(images, split / "FP")


def test_another_folder_than_cfp_s_is_refused(cfp):
    images, split = cfp
    with pytest.raises(
        EvalError, match=r"Split: a folder: expected a list of pairs, or CFP's folder Protocol/Split/FP or Protocol/Split/FF"
    ):
        find_pairs(images, split)
