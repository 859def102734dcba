"""TAR at a FAR among all pairs in tiles, against every pair scored by itself."""

import itertools
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch

from eval.commands.shared import Progress
from eval.errors import EvalError
from eval.mfr_pairs import Comparison, Images, Tail, TileSpeed, _Products, full_float32, score_pairs
from eval.mfr_state import ScoringState
from eval.verification import TarAtFar, most_false_accepts, tar_at_far


def brute_force(embeddings: np.ndarray, images: Images, comparison: Comparison) -> TarAtFar:
    """Every pair by itself, in float64, and the definition of ``eval.verification``."""
    scores, same = [], []
    for a, b in comparison.section_pairs:
        first, second = (range(*images.bounds(section)) for section in (a, b))
        for i, j in itertools.combinations(first, 2) if a == b else itertools.product(first, second):
            scores.append(float(embeddings[i].astype(np.float64) @ embeddings[j].astype(np.float64)))
            same.append(images.labels[i] == images.labels[j])
    return tar_at_far(scores, np.array(same), comparison.far)


def whole_numbers(count: int, high: int = 3, seed: int = 0) -> np.ndarray:
    """[count, 4] float32 whole numbers: products are exact whatever makes them, and many are equal."""
    return np.random.default_rng(seed).integers(-high, high + 1, (count, 4)).astype(np.float32)


def labels_of(count: int, persons: int, seed: int = 1) -> np.ndarray:
    """[count] int64, in no order."""
    return np.random.default_rng(seed).integers(0, persons, count)


ALL_TO_ALL = ((0, 0),)


@pytest.mark.parametrize("far", [1e-1, 1e-2, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("tile_size", [1, 7, 16, 61, 62, 200])
def test_all_to_all_in_tiles_of_any_size_equals_every_pair_by_itself(far, tile_size):
    images, embeddings = Images(labels_of(61, 12), (61,)), whole_numbers(61)
    comparison = Comparison("all", ALL_TO_ALL, far)
    assert score_pairs(embeddings, images, [comparison], tile_size=tile_size) == {"all": brute_force(embeddings, images, comparison)}


@pytest.mark.parametrize("seed", range(20))
def test_ties_at_the_threshold_are_accepted_or_refused_together(seed):
    images, embeddings = Images(labels_of(40, 9, seed), (40,)), whole_numbers(40, 1, seed)  # 9 different scores among 780
    for far in (0.002, 0.02, 0.2):
        comparison = Comparison("all", ALL_TO_ALL, far)
        assert score_pairs(embeddings, images, [comparison], tile_size=8)["all"] == brute_force(embeddings, images, comparison)


def test_equal_images_of_two_persons_leave_no_threshold_but_one_above_all():
    embeddings, images = np.ones((10, 2), np.float32), Images(np.arange(10) // 2, (10,))
    result = score_pairs(embeddings, images, [Comparison("all", ALL_TO_ALL, 0.1)], tile_size=4)["all"]
    assert result == TarAtFar(0.1, 0.0, 0.0, float(np.nextafter(2.0, np.inf)), genuine=5, impostor=40)


@pytest.mark.parametrize("tile_size", [5, 16, 64])
def test_sections_are_measured_alone_together_and_one_against_the_other(tile_size):
    labels = np.concatenate([labels_of(30, 6), 100 + labels_of(1, 1), 200 + labels_of(23, 4)])
    images, embeddings = Images(labels, (30, 1, 23)), whole_numbers(54)
    everything = tuple(itertools.combinations_with_replacement(range(3), 2))
    comparisons = [Comparison("first", ALL_TO_ALL, 0.01), Comparison("third", ((2, 2),), 0.05), Comparison("all", everything, 0.01)]
    found = score_pairs(embeddings, images, comparisons, tile_size=tile_size)
    assert found == {each.name: brute_force(embeddings, images, each) for each in comparisons}
    # Of one person in two sections, as with a mask and without.
    images, crossed = Images(labels_of(54, 8), (30, 24)), Comparison("mask", ((0, 1),), 0.01)
    assert score_pairs(embeddings, images, [crossed], tile_size=tile_size)["mask"] == brute_force(embeddings, images, crossed)


def test_unit_vectors_score_as_float64_does_up_to_the_last_bits():
    rng = np.random.default_rng(0)
    labels = labels_of(300, 60)
    vectors = rng.standard_normal((60, 64))[labels] + rng.standard_normal((300, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    images, comparison = Images(labels, (300,)), Comparison("all", ALL_TO_ALL, 1e-3)
    found = score_pairs(vectors.astype(np.float32), images, [comparison], tile_size=64)["all"]
    expected = brute_force(vectors, images, comparison)
    assert found.threshold == pytest.approx(expected.threshold, abs=1e-6)
    assert (found.genuine, found.impostor) == (expected.genuine, expected.impostor)
    assert found.far == expected.far  # no two scores are near enough for float32 to swap them
    assert found.tar == expected.tar
    assert 0.1 < found.tar < 0.9


@pytest.mark.parametrize("keep", [1, 10, 999, 1000, 2000])
def test_a_tail_keeps_the_highest_whatever_the_order_and_forgets_the_rest(keep, monkeypatch):
    monkeypatch.setattr("eval.mfr_pairs._PRUNE_SLACK", 5)
    for seed, order in itertools.product(range(3), ("random", "rising", "falling")):
        scores = np.random.default_rng(seed).integers(0, 300, 1000).astype(np.float32)
        scores = {"random": scores, "rising": np.sort(scores), "falling": np.sort(scores)[::-1].copy()}[order]
        tail = Tail(keep)
        for part in torch.from_numpy(scores).view(-1, 5, 10):
            tail.add(part, part.amax(1))
            assert sum(map(len, tail._chunks)) <= 2 * keep + 5
        assert sorted(tail.values()) == sorted(scores)[-keep:]
        assert tail.cutoff == (min(tail.values()) if keep <= 1000 else -np.inf)


@pytest.mark.parametrize(("far", "impostor"), [(1e-6, 10**6), (1e-6, 10**6 - 1), (1e-4, 30_000), (0.29, 100), (1.0, 7), (1e-6, 10**12 + 1)])
def test_the_most_false_accepts_are_counted_as_floats_compare(far, impostor):
    most = most_false_accepts(far, impostor)
    assert most / impostor <= far
    assert most == impostor or (most + 1) / impostor > far


# --- what is refused


@pytest.mark.parametrize(
    ("labels", "far", "message"),
    [
        (np.zeros(5, int), 0.5, "all: TAR@FAR=0.5 needs at least 1 genuine and 2 impostor pairs, found 10 and 0; add images"),
        (np.arange(5), 0.5, "found 0 and 10"),
        (np.array([0, 0, 1, 2, 3]), 0.1, "at least 1 genuine and 10 impostor pairs, found 1 and 9"),
        (np.zeros(1, int), 1.0, "found 0 and 0"),
    ],
)
def test_pairs_that_cannot_resolve_the_far_are_refused(labels, far, message):
    with pytest.raises(EvalError, match=message):
        score_pairs(whole_numbers(len(labels)), Images(labels, (len(labels),)), [Comparison("all", ALL_TO_ALL, far)])


def test_embeddings_that_are_not_finite_or_not_as_many_as_the_labels_are_refused():
    images, comparison = Images(np.arange(6) // 2, (6,)), Comparison("all", ALL_TO_ALL, 0.5)
    bad = whole_numbers(6)
    bad[4, 1] = np.nan
    with pytest.raises(EvalError, match="1 of 6 embeddings are not finite"):
        score_pairs(bad, images, [comparison])
    for wrong in (whole_numbers(5), whole_numbers(6).astype(np.float64), whole_numbers(6)[0]):
        with pytest.raises(EvalError, match=r"expected embeddings \[6, D\] float32, got"):
            score_pairs(wrong, images, [comparison])


@pytest.mark.parametrize("sections", [(3, 4), (6, 0), ()])
def test_sections_that_are_not_those_of_the_labels_are_refused(sections):
    with pytest.raises(EvalError, match="6 labels for sections of"):
        Images(np.zeros(6, int), sections)


# --- precision


@pytest.mark.parametrize("outside", ["high", "medium"])
def test_products_are_of_full_precision_whatever_was_allowed_outside(outside):
    torch.set_float32_matmul_precision(outside)
    try:
        with full_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == outside
        with pytest.raises(ZeroDivisionError), full_float32(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == outside
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mantissa", [10, 7])  # of TF32 and of bfloat16, without the leading bit
def test_a_device_that_rounds_its_operands_is_refused(mantissa, monkeypatch):
    def rounding(first, second):
        scale = 2.0**mantissa
        return (first * scale).round().div(scale) @ second

    monkeypatch.setattr(torch, "mm", rounding)
    with pytest.raises(EvalError, match="float32 products on cpu are made of fewer bits"), full_float32(torch.device("cpu")):
        pass


# --- progress on disk


class Stopped(Exception):
    pass


def random_faces() -> tuple[np.ndarray, Images, list[Comparison]]:
    labels = np.concatenate([labels_of(150, 30), 1000 + labels_of(90, 20)])
    vectors = np.random.default_rng(0).standard_normal((240, 32)).astype(np.float32)
    return vectors, Images(labels, (150, 90)), [Comparison("one", ALL_TO_ALL, 1e-3), Comparison("all", ((0, 0), (0, 1), (1, 1)), 1e-3)]


def stop_after(tiles: int):
    left = itertools.count(tiles, -1)

    def progress(done: int, total: int) -> None:
        if next(left) <= 1:
            raise Stopped

    return progress


@pytest.mark.parametrize("tiles", [1, 12, 40, 65, 71])
def test_a_stopped_run_goes_on_to_the_identical_result(tmp_path, tiles):
    embeddings, images, comparisons = random_faces()
    whole = score_pairs(embeddings, images, comparisons, tile_size=20)
    path, counted = tmp_path / "state.safetensors", []
    with pytest.raises(Stopped):
        score_pairs(embeddings, images, comparisons, tile_size=20, state=ScoringState(path, 0), progress=stop_after(tiles))
    assert path.exists() == (tiles > 8)  # the first strip is of 8 tiles
    resumed = score_pairs(
        embeddings, images, comparisons, tile_size=20, state=ScoringState(path, 0), progress=lambda *at: counted.append(at)
    )
    assert resumed == whole
    assert counted[-1][0] == counted[-1][1]
    assert len(counted) < 91 or tiles == 1  # of 91 tiles; those before were not made again
    # Complete, it answers from the file.
    assert score_pairs(embeddings, images, comparisons, tile_size=20, state=ScoringState(path), progress=stop_after(1)) == whole


def test_a_run_that_goes_on_with_no_pair_left_says_so_and_ends(tmp_path, capsys):
    """The last strip is of one image, which has no other after it."""
    embeddings = np.random.default_rng(0).standard_normal((21, 8), dtype=np.float32)
    images, comparisons = Images(np.arange(21) // 2, (21,)), [Comparison("all", ((0, 0),), 0.1)]
    state = ScoringState(tmp_path / "state.safetensors", 0)
    with pytest.raises(Stopped):
        score_pairs(embeddings, images, comparisons, tile_size=20, state=state, progress=stop_after(3))
    resumed = score_pairs(embeddings, images, comparisons, tile_size=20, state=state, progress=Progress("pairs"))
    assert resumed == score_pairs(embeddings, images, comparisons, tile_size=20)
    assert "0/0 pairs" in capsys.readouterr().err


def slow_run(path) -> None:
    torch.set_num_threads(1)
    embeddings, images, comparisons = random_faces()
    score_pairs(embeddings, images, comparisons, tile_size=20, state=ScoringState(path, 0), progress=lambda *_: time.sleep(0.02))


def test_a_killed_process_leaves_progress_from_which_the_result_is_identical(tmp_path):
    path = tmp_path / "state.safetensors"
    process = multiprocessing.get_context("spawn").Process(target=slow_run, args=(path,))
    process.start()
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.join()
    embeddings, images, comparisons = random_faces()
    counted = []
    state = ScoringState(path)
    resumed = score_pairs(embeddings, images, comparisons, tile_size=20, state=state, progress=lambda *at: counted.append(at))
    assert resumed == score_pairs(embeddings, images, comparisons, tile_size=20)
    assert 0 < len(counted) < 91
    state.discard()
    assert [name for name in os.listdir(tmp_path) if ".new-" not in name] == []


def test_progress_of_other_data_or_another_question_is_refused(tmp_path):
    embeddings, images, comparisons = random_faces()
    path = tmp_path / "state.safetensors"
    score_pairs(embeddings, images, comparisons, tile_size=20, state=ScoringState(path))
    moved = embeddings.copy()
    moved[7, 3] = np.nextafter(moved[7, 3], np.float32(9))
    others = {
        "embeddings": (moved, images, comparisons, 20),
        "labels, sections": (embeddings, Images(labels_of(240, 50), (160, 80)), comparisons, 20),
        "comparisons": (embeddings, images, [Comparison("one", ALL_TO_ALL, 2e-3), comparisons[1]], 20),
        "tile_size": (embeddings, images, comparisons, 21),
    }
    for differing, (vectors, of_images, asked, tile_size) in others.items():
        with pytest.raises(EvalError, match=rf"state\.safetensors: is the progress of another scoring: .*{differing} differ; delete it"):
            score_pairs(vectors, of_images, asked, tile_size=tile_size, state=ScoringState(path))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data.replace(b"state", b"stand")])
def test_damaged_progress_is_refused_by_name(tmp_path, damage):
    embeddings, images, comparisons = random_faces()
    path = tmp_path / "state.safetensors"
    score_pairs(embeddings, images, comparisons, tile_size=20, state=ScoringState(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EvalError, match=r"state\.safetensors: no readable progress of a scoring: .*; delete it to begin anew"):
        score_pairs(embeddings, images, comparisons, tile_size=20, state=ScoringState(path))


def test_the_measured_rates_are_of_work_that_was_done(monkeypatch):
    """The tiles that were made beside the diagonal and on it, after the first ones, took as long as the rates say."""
    tiles: dict[bool, list[float]] = {False: [], True: []}  # on the diagonal -> when each was done
    share_out = _Products.share_out

    def counted(products, rows, columns, tallies) -> int:
        pairs = share_out(products, rows, columns, tallies)
        tiles[rows == columns].append(time.perf_counter())
        return pairs

    monkeypatch.setattr(_Products, "share_out", counted)
    speed = TileSpeed.measure(16, seconds=0.2)
    for on_diagonal, rate in ((False, speed.impostors), (True, speed.mixed)):
        last = [end for end in tiles[on_diagonal] if end > tiles[on_diagonal][-1] - 0.19]
        assert rate == pytest.approx(2048**2 * (len(last) - 1) / (last[-1] - last[0]), rel=0.5)


def test_an_estimate_counts_whole_tiles_and_those_with_genuine_pairs_apart():
    """Sections of 5 and 3 images in tiles of 2: pairs of rows and columns that are multiplied, by hand."""
    images = Images(np.array([0, 0, 1, 1, 2, 0, 7, 7]), (5, 3))
    speed = TileSpeed(2, impostors=1.0, mixed=0.25)
    within = [Comparison("within", ((0, 0),), 0.5)]
    # On the diagonal 2x2, 2x2 and 1x1, which may be genuine; above it (0 0|1 1), (0 0|2), (1 1|2), which are not.
    assert speed.seconds(images, within) == (4 + 4 + 1) / 0.25 + (4 + 2 + 2)
    # Person 0 is in both sections, 7 in the second alone: of (0 0|1 1|2) x (0 7|7) all that begin at 0 overlap with (0 7).
    across = [Comparison("across", ((0, 1),), 0.5)]
    assert speed.seconds(images, across) == (4 + 4 + 2) / 0.25 + (2 + 2 + 1)
    assert speed.seconds(images, within + across) == speed.seconds(images, within) + speed.seconds(images, across)
