"""Pairs: accuracy and TAR@FAR against brute force, the reader of pairs files, and a whole evaluation of a made-up model."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from eval.embedder import Embedder
from eval.errors import EvalError
from eval.pairs import evaluate_pairs
from eval.pairs_file import find_pairs, read_pairs
from eval.verification import FIELD_GRID, contiguous_folds, kfold_accuracy, tar_at_far


def random_scores(seed: int, count: int, *, ties: bool, separation: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.5
    scores = rng.normal(size=count) + separation * same
    return (np.round(scores * 2) / 2 if ties else scores), same


# --- accuracy over folds


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_each_fold_is_judged_at_the_best_threshold_of_the_others(seed, ties):
    scores, same = random_scores(seed, 60, ties=ties)
    found = kfold_accuracy(scores, same, 6)
    grid = np.sort(np.concatenate([scores, scores + 1e-9, [scores.max() + 1]]))  # every partition, by brute force
    for fold in range(6):
        held_out = slice(10 * fold, 10 * fold + 10)
        train, train_same = np.delete(scores, held_out), np.delete(same, held_out)
        right = [np.mean((train >= threshold) == train_same) for threshold in grid]
        threshold = found.thresholds[fold]
        assert np.mean((train >= threshold) == train_same) == max(right)
        stricter = [value for value, candidate in zip(right, grid, strict=True) if (train >= candidate).sum() < (train >= threshold).sum()]
        assert not stricter or max(stricter) < max(right)  # of equals, the highest threshold
        assert found.accuracies[fold] == np.mean((scores[held_out] >= threshold) == same[held_out])
    assert found.mean == pytest.approx(np.mean(found.accuracies))
    assert found.std == pytest.approx(np.sqrt(np.mean((np.array(found.accuracies) - found.mean) ** 2)))


def test_the_field_grid_is_squared_distance_in_steps_of_a_hundredth():
    scores, same = random_scores(3, 300, ties=False)
    scores = np.tanh(scores)
    found = kfold_accuracy(scores, same, 10, FIELD_GRID)
    distances, steps = 2 - 2 * scores, np.arange(0, 4, 0.01)
    for fold in range(10):
        held_out = np.arange(30 * fold, 30 * fold + 30)
        right = [np.mean(np.delete((distances < step) == same, held_out)) for step in steps]
        best = steps[int(np.argmax(right))]  # the first: the smallest distance
        assert found.thresholds[fold] == pytest.approx(1 - best / 2)
        assert found.accuracies[fold] == np.mean((distances[held_out] < best) == same[held_out])


def test_thresholds_lie_midway_between_the_scores_that_they_part():
    scores, same = np.array([0.1, 0.3, 0.7, 0.9] * 2), np.array([False, False, True, True] * 2)
    assert kfold_accuracy(scores, same, 2).thresholds == (0.5, 0.5)


def test_neighbouring_floats_are_parted():
    low = 0.3
    high = np.nextafter(low, 1)
    found = kfold_accuracy([low, high] * 4, [False, True] * 4, 2)
    assert found.mean == 1
    assert found.thresholds == (high, high)


def test_perfect_scores_reach_1_and_scores_that_say_nothing_reach_chance():
    same = np.tile([True] * 50 + [False] * 50, 10)
    assert kfold_accuracy(np.where(same, 0.9, 0.1), same).accuracies == (1.0,) * 10
    constant = kfold_accuracy(np.full(1000, 0.5), same)
    assert (constant.mean, constant.std) == (0.5, 0.0)
    assert constant.thresholds == (np.nextafter(0.5, 1),) * 10  # accepting all and none are equally good; none is stricter
    noise = kfold_accuracy(np.random.default_rng(0).normal(size=1000), same)
    assert noise.mean == pytest.approx(0.5, abs=0.05)  # 3 standard deviations of a share of 1000 coin flips


def test_one_sided_training_folds_accept_all_or_none():
    assert kfold_accuracy([0.5, 0.6, 0.7, 0.8], [True] * 4, 2).thresholds == (0.7, 0.5)
    assert kfold_accuracy([0.5, 0.6, 0.7, 0.8], [False] * 4, 2).thresholds == (np.nextafter(0.8, 1), np.nextafter(0.6, 1))


def test_contiguous_folds_are_the_fields():
    """As scikit-learn's KFold(n_splits=10, shuffle=False) cuts 23 and 6,000 pairs: the first 23 % 10 folds have one more."""
    assert "".join(map(str, contiguous_folds(23, 10))) == "00011122233445566778899"
    assert np.array_equal(contiguous_folds(6000, 10), np.repeat(np.arange(10), 600))


def test_pairs_of_a_fold_may_lie_anywhere():
    scores, same = random_scores(7, 60, ties=False)
    order = np.random.default_rng(0).permutation(60)
    mixed = kfold_accuracy(scores[order], same[order], (np.arange(60) // 10)[order])
    assert mixed == kfold_accuracy(scores, same, 6)
    assert mixed != kfold_accuracy(scores[order], same[order], 6)


@pytest.mark.parametrize(
    ("scores", "same", "folds", "message"),
    [
        ([0.1, 0.2], [True], 2, "equally long"),
        ([], np.zeros(0, bool), 2, "non-empty"),
        ([0.1, np.nan], [True, False], 2, "1 of 2 scores are not finite"),
        ([0.1, 0.2], [1, 0], 2, "same must be bool"),
        ([0.1, 0.2], [True, False], 1, "1 folds of 2 pairs"),
        ([0.1, 0.2], [True, False], 3, "3 folds of 2 pairs"),
        ([0.1, 0.2], [True, False], [0, 0], "one fold; accuracy needs two or more"),
        ([0.1, 0.2], [True, False], [0, 1, 0], "3 folds given for 2 pairs"),
        ([0.1, 0.2, 0.3], [True, False, True], [0, 3, 0], "2 folds numbered 0 to 3, expected 0 to 1, with a pair in each"),
        ([0.1, 0.2, 0.3], [True, False, True], [-1, 0, 1], "3 folds numbered -1 to 1, expected 0 to 2"),
        ([0.1, 0.2], [True, False], [0.0, 1.0], "the fold of each pair, integers"),
    ],
)
def test_scores_that_make_no_sense_are_refused(scores, same, folds, message):
    with pytest.raises(EvalError, match=message):
        kfold_accuracy(scores, same, folds)


# --- TAR@FAR


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("far", [0.01, 0.03, 0.1, 0.5, 1.0])
def test_tar_is_the_highest_whose_far_is_at_most_the_target(far, ties):
    scores, same = random_scores(7, 400, ties=ties)
    found = tar_at_far(scores, same, far)
    points = []
    for threshold in [*scores, scores.max() + 1]:
        accepted = scores >= threshold
        points.append((accepted[same].sum() / same.sum(), accepted[~same].sum() / (~same).sum()))
    assert found.tar == max(tar for tar, reached in points if reached <= far)
    assert found.far <= far
    accepted = scores >= found.threshold
    assert (found.tar, found.far) == (accepted[same].sum() / found.genuine, accepted[~same].sum() / found.impostor)


def test_a_far_target_that_is_a_whole_number_of_impostors_may_be_used_up():
    scores = np.concatenate([np.arange(1000.0), [998.5]])
    same = np.arange(1001) == 1000
    assert tar_at_far(scores, same, 1e-3).tar == 1.0  # only impostor 999 lies above: exactly one of a thousand
    scores[-1] = 997.5
    assert tar_at_far(scores, same, 1e-3).tar == 0.0


def test_impostors_tied_at_the_top_leave_nothing_to_accept():
    found = tar_at_far([1.0] * 10 + [1.0] * 20, [True] * 10 + [False] * 20, 0.1)
    assert (found.tar, found.far, found.threshold) == (0.0, 0.0, np.nextafter(1.0, 2))


def test_a_far_that_the_impostor_pairs_cannot_resolve_is_refused():
    scores, same = np.arange(1100) / 1100, np.arange(1100) >= 1000
    assert tar_at_far(scores, same, 1e-3).tar == 1.0
    with pytest.raises(EvalError, match=r"TAR@FAR=0.0001 needs at least 1 genuine and 10000 impostor pairs, found 100 and 1000"):
        tar_at_far(scores, same, 1e-4)
    with pytest.raises(EvalError, match="found 0 and 1000"):
        tar_at_far(scores[:1000], same[:1000], 1e-3)
    with pytest.raises(EvalError, match=r"must lie in \(0, 1\], got 0"):
        tar_at_far(scores, same, 0)


# --- the reader

GOOD = "2\t1\nAda Lovelace\t1\t2\nAda Lovelace\t1\tBob\t3\nBob\t1\t3\nBob\t2\tAda Lovelace\t2\n"


def write(folder, text: str):
    path = folder / "pairs.txt"
    path.write_text(text)
    return path


def test_pairs_are_read_in_order_with_names_that_hold_spaces(tmp_path):
    found = read_pairs(write(tmp_path, GOOD + "\n"))
    assert found.num_folds == 2
    assert [(pair.first, pair.second, pair.same, pair.line) for pair in found.pairs] == [
        (("Ada Lovelace", 1), ("Ada Lovelace", 2), True, 2),
        (("Ada Lovelace", 1), ("Bob", 3), False, 3),
        (("Bob", 1), ("Bob", 3), True, 4),
        (("Bob", 2), ("Ada Lovelace", 2), False, 5),
    ]


def test_fields_may_be_separated_by_spaces(tmp_path):
    assert read_pairs(write(tmp_path, "1 1\nAda 1 2\nAda  1 Bob 3\n")).pairs[1].second == ("Bob", 3)


def test_a_list_that_an_editor_on_windows_saved_is_read_alike(tmp_path):
    expected = read_pairs(write(tmp_path, GOOD))
    (tmp_path / "pairs.txt").write_bytes(GOOD.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_pairs(tmp_path / "pairs.txt") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("500\nAda\t1\t2\n", "line 1: expected two positive numbers"),
        ("0\t3\n", "line 1: expected two positive numbers"),
        ("Ada\t1\t2\n", "line 1: expected two positive numbers"),
        (GOOD.replace("2\t1\n", "10\t300\n", 1), "line 1: 10 folds of 2 x 300 pairs are 6000 lines, found 4"),
        (GOOD.replace("Bob\t1\t3", "Bob\t1"), "line 4: expected name number number here, found 2 fields"),
        (GOOD.replace("Bob\t1\t3", "Bob\t1\tAda Lovelace\t3"), "line 4: expected name number number here, found 4 fields"),
        (GOOD.replace("Lovelace\t1\tBob", "Lovelace\tBob"), "line 3: expected name number name number here, found 3 fields"),
        (GOOD.replace("Bob\t1\t3", "Bob\tone\t3"), "line 4: expected name number number, but 'one' is no image number"),
        (GOOD.replace("Bob\t1\t3", "Bob\t1\t1"), "line 4: an image paired with itself"),
        (GOOD.replace("Ada Lovelace\t1\tBob\t3", "Bob\t1\tBob\t3"), "line 3: a pair of two persons that names one person twice"),
        (GOOD.replace("Bob\t1\t3", "../Bob\t1\t3"), "line 4: '../Bob' can't be the name of a folder"),
        (GOOD.replace("Bob\t1\t3", "..\t1\t3"), r"line 4: '\.\.' can't be the name of a folder"),
        (GOOD.replace("Bob\t1\t3", "/tmp\t1\t3"), "line 4: '/tmp' can't be the name of a folder"),
    ],
)
def test_a_wrong_line_is_named_with_its_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(EvalError, match=message) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_or_binary_pairs_file_is_named(tmp_path):
    with pytest.raises(EvalError, match=r"nowhere.txt: no such pairs file"):
        read_pairs(tmp_path / "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvalError, match=r"binary.txt: not a text file"):
        read_pairs(tmp_path / "binary.txt")
    with pytest.raises(EvalError, match="Is a directory"):
        read_pairs(tmp_path)


# --- a whole evaluation


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def corner_embedder(batch_size: int = 3, calls: list | None = None) -> Embedder:
    """The embedding is the pixel (row 0, column 0) as three numbers."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(len(pixels))
        return pixels[:, :, 0, 0]

    return Embedder(forward, source="corner", input_range="0..255", batch_size=batch_size)


@pytest.fixture
def people(tmp_path):
    """Four people of two images; a person's images have the person's colour in the left corner and black in the right."""
    rng = np.random.default_rng(0)
    for index, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (200, 200, 0)]):
        folder = tmp_path / "images" / f"P.{index}"
        folder.mkdir(parents=True)
        for number in (1, 2):
            pixels = rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)
            pixels[0, 0], pixels[0, -1] = colour, 0
            suffix = ".png" if number == 1 else ".jpeg"
            Image.fromarray(pixels).save(folder / f"P.{index}_{number:04d}{suffix}", format="PNG")
    folds = [[(first, second)] for first, second in ((0, 1), (2, 3), (1, 2), (3, 0))]
    lines = [f"{len(folds)}\t1"]
    for [(first, second)] in folds:
        lines += [f"P.{first}\t1\t2", f"P.{first}\t1\tP.{second}\t2"]
    return tmp_path / "images", write(tmp_path, "\n".join(lines) + "\n")


def test_images_are_embedded_once_with_their_mirror_and_pairs_scored_by_cosine(people):
    calls, progress = [], []
    report = evaluate_pairs(corner_embedder(calls=calls), find_pairs(*people), progress=lambda counted: lambda *done: progress.append(done))
    assert sum(calls) == 2 * 8
    assert progress == [(3, 8), (6, 8), (8, 8)]
    assert (report.num_pairs, report.num_images, report.embedding_size) == (8, 8, 3)
    # Cosines: 1 for one person; 0, 0, 0 and cos 45 degrees for two. The highest impostor is held out last.
    assert report.accuracy_exact.accuracies == (1.0, 1.0, 1.0, 0.5)
    assert report.accuracy_exact.thresholds == pytest.approx((0.5 + 0.5**1.5,) * 3 + (0.5,))
    assert report.tar_at_far == ()
    assert report.unresolved_far == (1e-1, 1e-2, 1e-3, 1e-4)  # four impostor pairs resolve none of them


def test_the_report_does_not_depend_on_the_batch_size_or_on_mirrored_images(people):
    reports = [evaluate_pairs(corner_embedder(size), find_pairs(*people)).accuracy for size in (1, 5, 64)]
    assert reports[0] == reports[1] == reports[2]
    for path in people[0].rglob("*.*eg"):
        Image.fromarray(np.asarray(Image.open(path))[:, ::-1]).save(path, format="PNG")
    assert evaluate_pairs(corner_embedder(), find_pairs(*people)).accuracy == reports[0]


def test_a_missing_image_is_named_with_the_line_that_asks_for_it(people):
    images, pairs = people
    (images / "P.3" / "P.3_0002.jpeg").unlink()
    with pytest.raises(EvalError, match=r"P.3/P.3_0002: no such image, with suffix .jpg, .png, .jpeg \(asked for by .*pairs.txt, line 5\)"):
        evaluate_pairs(corner_embedder(), find_pairs(images, pairs))


def test_images_of_another_size_and_files_that_are_no_images_are_named(people):
    images, pairs = people
    path = images / "P.1" / "P.1_0001.png"
    Image.new("RGB", (250, 240)).save(path)
    with pytest.raises(EvalError, match=r"P.1_0001.png: expected an aligned 112 x 112 face, found 250 x 240 pixels"):
        evaluate_pairs(corner_embedder(), find_pairs(images, pairs))
    Image.fromarray(np.full((112, 112), 30000, np.uint16)).save(path)
    with pytest.raises(EvalError, match=r"P.1_0001.png: more than 8 bits per pixel and channel"):
        evaluate_pairs(corner_embedder(), find_pairs(images, pairs))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)) + png_chunk(b"IDAT", b"")
    )
    with pytest.raises(EvalError, match=r"P.1_0001.png: expected an aligned 112 x 112 face, found 9000 x 9000 pixels"):
        evaluate_pairs(corner_embedder(), find_pairs(images, pairs))  # and nothing of that size was decoded: there is no data
    Image.new("RGB", (112, 112)).save(path, format="PPM")  # its suffix says PNG
    with pytest.raises(EvalError, match=r"P.1_0001.png: not a readable image"):
        evaluate_pairs(corner_embedder(), find_pairs(images, pairs))
    path.write_bytes(b"no image")
    with pytest.raises(EvalError, match=r"P.1_0001.png: not a readable image"):
        evaluate_pairs(corner_embedder(), find_pairs(images, pairs))
    with pytest.raises(EvalError, match="elsewhere: no such folder of images"):
        find_pairs(images / "elsewhere", pairs)


def test_one_fold_is_refused(people):
    images, pairs = people
    pairs.write_text("1\t1\nP.0\t1\t2\nP.0\t1\tP.1\t2\n")
    with pytest.raises(EvalError, match=r"pairs\.txt: one fold; accuracy needs two or more"):
        find_pairs(images, pairs)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_image_whose_embedding_is_not_finite_is_named(people, value):
    counter = itertools.count()

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        out = torch.ones(len(pixels), 4)
        out[1] = value if next(counter) in (2, 3) else 1  # the second batch: images 3, 4, 5
        return out

    embedder = Embedder(forward, source="broken", input_range="0..255", batch_size=3)
    with pytest.raises(EvalError, match=r"P.2_0002.jpeg: its embedding is zero or not finite \(1 of 3 in its batch\); check broken"):
        evaluate_pairs(embedder, find_pairs(*people))
