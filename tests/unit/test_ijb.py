"""The numbers of IJB: pooling, 1:1 and 1:N, against a slow reference, scikit-learn and cases worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from eval.errors import EvalError
from eval.ijb import evaluate_templates
from eval.ijb_identification import FPIR_TARGETS, RANKS, search, search_gallery
from eval.ijb_meta import IjbTemplates, Search, Subjects
from eval.ijb_pairs import TemplatePairs
from eval.ijb_templates import DEFAULT_MODE, MODES, Mode, pool_templates
from eval.ijb_verification import FAR_TARGETS, nearest_tars, score_pairs, strict_tars
from eval.images import FaceImages
from eval.verification import tar_at_far
from tests import reference_ijb as reference

N, T, D = 300, 60, 16


def unread(image: int) -> bytes:
    raise AssertionError("pooling reads no image")


def templates_of(members: np.ndarray, scores: np.ndarray) -> IjbTemplates:
    """``members`` [m, 3]: image, template id, media."""
    ids, position = np.unique(members[:, 1], return_inverse=True)
    order = np.lexsort((members[:, 2], position))
    names = [f"{image}.jpg" for image in range(len(scores))]
    return IjbTemplates(FaceImages(names, unread), scores, ids, members[order, 0], position[order], members[order, 2])


@pytest.fixture(scope="module")
def world():
    """Embeddings [N, 2, D] of images in templates of 1 to 40, with media that hold one or many and recur in other templates."""
    rng = np.random.default_rng(0)
    owner = np.concatenate([np.arange(T), rng.integers(0, 5, 80), rng.integers(0, T, N - T - 80)])
    ids = rng.permutation(1000)[:T]
    members = np.stack([np.arange(N), ids[owner], rng.integers(0, 4, N)], axis=1)
    members = np.concatenate([members, [[0, ids[7], 9], [1, ids[7], 9]]])  # images of other templates too
    scores = rng.uniform(0.1, 1, N)
    faces = rng.standard_normal((20, D))
    embeddings = (3 * faces[owner % 20][:, None] + 4 * rng.standard_normal((N, 2, D))) * rng.uniform(0.2, 5, (N, 1, 1))
    return embeddings.astype(np.float32), rng.permutation(members), scores


def by_reference(world, mode: Mode) -> np.ndarray:
    embeddings, members, scores = world
    images = {image: (*embeddings[image].tolist(), float(scores[image])) for image in range(N)}
    vectors = reference.pooled(images, members.tolist(), mode.norm, mode.detector, mode.flip)
    return np.array([vectors[template] for template in sorted(vectors)])


def test_the_default_mode_is_the_published_one():
    assert str(DEFAULT_MODE) == "N1D1F1"
    assert len(set(map(str, MODES))) == 8


@pytest.mark.parametrize("chunk_rows", [1, 50, 4096])
def test_every_mode_pools_as_the_reference_does(world, monkeypatch, chunk_rows):
    embeddings, members, scores = world
    monkeypatch.setattr("eval.ijb_templates.CHUNK_ROWS", chunk_rows)
    seen = []
    pooled = pool_templates(embeddings, templates_of(members, scores), lambda done, total: seen.append((done, total)))
    assert pooled.dtype == np.float32
    assert seen[-1] == (N + 2, N + 2)
    expected = [by_reference(world, mode) for mode in MODES]
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-7)  # rounded to float32 at the end alone
    apart = [np.abs(expected[i] - expected[j]).max() for i in range(8) for j in range(i)]
    assert min(apart) > 1e-3  # the modes differ


def test_embeddings_on_the_disk_are_read_in_parts(world, monkeypatch, tmp_path):
    embeddings, members, scores = world
    np.save(tmp_path / "e.npy", embeddings)
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    monkeypatch.setattr("eval.ijb_templates.CHUNK_ROWS", 30)
    sizes = []

    class Watched:
        shape = mapped.shape

        def __getitem__(self, rows):
            sizes.append(len(rows))
            return mapped[rows]

    templates = templates_of(members, scores)
    np.testing.assert_array_equal(pool_templates(Watched(), templates), pool_templates(embeddings, templates))
    largest = np.bincount(templates.template).max()
    assert max(sizes) <= max(30, largest)
    assert sum(sizes) == N + 2


def test_media_are_averaged_and_then_summed_by_hand():
    embeddings = np.array([[[3, 0], [0, 0]], [[1, 0], [0, 0]], [[0, 4], [0, 0]]], np.float32)
    templates = templates_of(np.array([[0, 5, 1], [1, 5, 1], [2, 5, 2]]), np.array([1.0, 0.5, 0.25]))
    pooled = dict(zip(map(str, MODES), pool_templates(embeddings, templates)[:, 0], strict=True))
    for name, (x, y) in {"N1D0F0": (2, 4), "N1D1F0": (1.75, 1), "N0D0F0": (1, 1), "N0D1F0": (0.75, 0.25)}.items():
        np.testing.assert_allclose(pooled[name], np.array([x, y]) / np.hypot(x, y), rtol=1e-6)
        np.testing.assert_allclose(pooled[name.replace("F0", "F1")], pooled[name])  # the mirror adds nothing here


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_an_embedding_that_is_zero_or_not_finite_is_refused_by_name(world, value):
    embeddings, members, scores = world
    broken = embeddings.copy()
    broken[17] = value
    with pytest.raises(EvalError, match=r"^17\.jpg: its embedding is zero or not finite$"):
        pool_templates(broken, templates_of(members, scores))


def test_a_template_whose_images_all_weigh_nothing_is_refused():
    templates = templates_of(np.array([[0, 5, 1], [1, 6, 1]]), np.array([1.0, 0.0]))
    with pytest.raises(EvalError, match=r"^template 6: its images add up to zero in mode N1D1F1; check their detector scores$"):
        pool_templates(np.ones((2, 2, 4), np.float32), templates)


@pytest.mark.parametrize("block", [1, 7, 256])
def test_scores_of_pairs_equal_their_dot_products(monkeypatch, block):
    monkeypatch.setattr("eval.ijb_verification.BLOCK", block)
    rng = np.random.default_rng(1)
    features = rng.standard_normal((40, 8)).astype(np.float32)
    first, second = np.sort(rng.integers(3, 30, 500)), rng.integers(0, 40, 500)
    pairs = TemplatePairs(first.astype(np.int32), second.astype(np.int32), np.ones(500, bool))
    expected = (features[first].astype(np.float64) * features[second]).sum(axis=1)
    np.testing.assert_allclose(score_pairs(features, pairs), expected, rtol=0, atol=1e-5)


def scored(seed: int, decimals: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending scores of 60 genuine and 400 impostor pairs; with few decimals there are many ties."""
    rng = np.random.default_rng(seed)
    genuine, impostor = rng.normal(0.45, 0.2, 60), rng.normal(0, 0.2, 400)
    return tuple(np.sort(scores.round(decimals).astype(np.float32)) for scores in (genuine, impostor))


FARS = (0.0026, 0.01, 0.0249, 0.1, 0.3, 0.5, 1.0)


@pytest.mark.parametrize("decimals", [1, 2, 6])
@pytest.mark.parametrize("seed", range(4))
def test_both_readings_equal_the_reference(seed, decimals):
    genuine, impostor = scored(seed, decimals)
    lists = genuine.tolist(), impostor.tolist()
    for far, strict, nearest in zip(FARS, strict_tars(genuine, impostor, FARS), nearest_tars(genuine, impostor, FARS), strict=True):
        expected = reference.strict_tar(*lists, far)
        if expected is None:  # even the highest score is that of too many impostors
            assert (strict.tar, strict.reached_far) == (0, 0)
            assert strict.threshold > impostor[-1]
        else:
            assert (strict.tar, strict.threshold, strict.reached_far) == expected
        assert (nearest.tar, nearest.reached_far) == reference.nearest_tar(*lists, far)
        for point in (strict, nearest):
            assert point.tar == np.mean(genuine >= point.threshold)
            assert point.reached_far == np.mean(impostor >= point.threshold)


@pytest.mark.parametrize("decimals", [2, 3, 6])
@pytest.mark.parametrize("seed", range(10))
def test_nearest_is_what_the_field_reads_off_scikit_learn_s_curve(seed, decimals):
    genuine, impostor = scored(seed, decimals)
    false, true, _ = roc_curve([1] * len(genuine) + [0] * len(impostor), np.concatenate([genuine, impostor]))
    false, true = false[::-1], true[::-1]
    for point in nearest_tars(genuine, impostor, FARS):
        at = int(np.argmin(np.abs(false - point.far)))  # the first of the nearest
        assert (point.tar, point.reached_far) == (true[at], false[at])


def test_strict_and_sorted_scores_agree_with_the_rule_for_pairs():
    genuine, impostor = scored(5, 2)
    scores, same = np.concatenate([genuine, impostor]), np.arange(460) < 60
    for point in strict_tars(genuine, impostor, FARS):
        found = tar_at_far(scores, same, point.far)
        assert (found.tar, found.threshold, found.far) == (point.tar, point.threshold, point.reached_far)


def by_hand(values: list[float]) -> np.ndarray:
    return np.sort(np.array(values, np.float32))


def test_nearest_may_pass_the_target_where_strict_may_not_by_hand():
    genuine, impostor = by_hand([0.9, 0.7, 0.5, 0.3]), by_hand([0.8, 0.6, 0.4, 0.2, 0.1])
    (strict,), (nearest,) = strict_tars(genuine, impostor, [0.35]), nearest_tars(genuine, impostor, [0.35])
    assert (strict.tar, strict.reached_far, strict.threshold) == (0.5, 0.2, np.float32(0.7))  # two false accepts of 5 are 0.4
    assert (nearest.tar, nearest.reached_far, nearest.threshold) == (0.75, 0.4, np.float32(0.5))


def test_of_two_nearest_the_lower_threshold_counts_by_hand():
    genuine, impostor = by_hand([0.9, 0.7, 0.5]), by_hand([0.8, 0.6, 0.4, 0.2])
    (nearest,) = nearest_tars(genuine, impostor, [0.375])  # between 0.25 and 0.5
    assert (nearest.tar, nearest.reached_far) == (1, 0.5)


def test_a_tie_of_genuine_and_impostor_is_accepted_or_refused_as_one_by_hand():
    genuine, impostor = by_hand([0.5, 0.5, 0.9]), by_hand([0.5, 0.5, 0.1, 0.0])
    (strict,), (nearest,) = strict_tars(genuine, impostor, [0.25]), nearest_tars(genuine, impostor, [0.3])
    assert (strict.tar, strict.reached_far, strict.threshold) == (pytest.approx(1 / 3), 0, np.float32(0.9))
    assert (nearest.tar, nearest.reached_far) == (1, 0.5)


def test_equal_scores_everywhere_are_all_or_nothing():
    genuine, impostor = by_hand([0.5, 0.5]), by_hand([0.5] * 4)
    (strict,), (near_none, near_all) = strict_tars(genuine, impostor, [0.25]), nearest_tars(genuine, impostor, [0.25, 0.75])
    assert (strict.tar, strict.reached_far) == (near_none.tar, near_none.reached_far) == (0, 0)
    assert min(strict.threshold, near_none.threshold) > 0.5
    assert (near_all.tar, near_all.reached_far, near_all.threshold) == (1, 1, 0.5)


def test_thinning_of_the_curve_decides_where_a_run_of_impostors_ends():
    """Of ten impostors in a row the curve keeps the ends; at its right end the next genuine is accepted too."""
    genuine, impostor = by_hand([0.9, 0.05]), by_hand(np.linspace(0.1, 0.5, 10).tolist())
    (nearest,) = nearest_tars(genuine, impostor, [0.7])
    assert (nearest.tar, nearest.reached_far) == (1, 1)  # all points: TAR 0.5 at FAR 0.7


def subjects(name: str, templates: list[int], people: list[int]) -> Subjects:
    return Subjects(name, np.array(templates), np.array(people))


def test_ranks_and_tpir_by_hand():
    """A gallery of three axes; probes: two mated, one mated but nearer to another, two impostors that score 0.6 and 0.3."""
    features = np.zeros((8, 4), np.float32)
    features[0, 0] = features[1, 1] = features[2, 2] = 1
    features[3], features[4], features[5] = [0.9, 0.1, 0, 0], [0.2, 0.5, 0.1, 0], [0, 0.4, 0.3, 0]
    features[6], features[7] = [0.6, 0, 0, 0], [0, 0, 0.3, 0]
    gallery = subjects("G1", [0, 1, 2], [30, 10, 20])
    probes = subjects("probes", [3, 4, 5, 6, 7], [30, 10, 20, 77, 78])
    found = search_gallery(features, gallery, probes)
    assert (found.templates, found.mated, found.impostors) == (3, 3, 2)
    assert found.ranks == {1: pytest.approx(2 / 3), 5: 1, 10: 1}
    assert (found.tpir, found.unresolved_fpir) == ((), FPIR_TARGETS)  # two impostors resolve no FPIR below 0.5


def test_tpir_counts_mates_that_are_best_and_above_the_threshold_by_hand(monkeypatch):
    monkeypatch.setattr("eval.ijb_identification.FPIR_TARGETS", (0.25, 0.5))
    features = np.zeros((10, 2), np.float32)
    features[0, 0] = features[1, 1] = 1
    features[2:6] = [[0.9, 0], [0.5, 0.1], [0.45, 0], [0.6, 0.8]]  # mates of template 0; the last is nearer to template 1
    features[6:] = [[0.5, 0], [0, 0.48], [0.2, 0], [0, 0.1]]
    probes = subjects("probes", list(range(2, 10)), [7, 7, 7, 7, 90, 91, 92, 93])
    found = search_gallery(features, subjects("G", [0, 1], [7, 8]), probes)
    assert found.ranks[1] == 0.75
    quarter, half = found.tpir
    assert (quarter.tpir, quarter.reached_fpir, quarter.threshold) == (0.5, 0.25, 0.5)  # 0.9, and 0.5 in a tie with the impostor
    assert (half.tpir, half.reached_fpir, half.threshold) == (0.75, 0.5, np.float32(0.45))  # 0.45 too, not the one that is not best


def test_a_template_that_ties_with_the_mate_counts_as_better():
    features = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    found = search_gallery(features, subjects("G", [0, 1], [1, 2]), subjects("probes", [2], [1]))
    assert found.ranks == {1: 0, 5: 1, 10: 1}


def test_a_gallery_without_mates_is_refused():
    features = np.eye(3, dtype=np.float32)
    with pytest.raises(EvalError, match=r"^gallery G: none of the 1 probes is of a subject in it$"):
        search_gallery(features, subjects("G", [0, 1], [1, 2]), subjects("probes", [2], [3]))


def test_search_equals_the_reference_in_blocks(monkeypatch):
    monkeypatch.setattr("eval.ijb_identification.BLOCK", 37)
    rng = np.random.default_rng(4)
    people = rng.standard_normal((60, 8))
    subject = np.concatenate([np.arange(40), rng.integers(0, 60, 260)])
    features = people[subject] + 0.8 * rng.standard_normal((300, 8))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    first, second = (Subjects(name, np.arange(a, b), subject[a:b]) for name, a, b in (("G1", 0, 25), ("G2", 25, 40)))
    probes = Subjects("probes", np.arange(40, 300), subject[40:])
    report = search(features, Search((first, second), probes))
    expected = []
    for gallery, found in zip((first, second), report.galleries, strict=True):
        enrolled = dict(zip(gallery.templates.tolist(), gallery.subjects.tolist(), strict=True))
        searched = dict(zip(probes.templates.tolist(), probes.subjects.tolist(), strict=True))
        ranks, tpir = reference.searched(features.tolist(), enrolled, searched, RANKS, FPIR_TARGETS)
        assert found.ranks == pytest.approx(ranks, abs=1e-12)
        assert {point.fpir: point.tpir for point in found.tpir} == pytest.approx(tpir, abs=1e-12)
        assert 0 < tpir[0.01] < tpir[0.1] < ranks[1] < ranks[10]
        expected.append((ranks, tpir))
    assert report.mean_ranks == pytest.approx({k: (expected[0][0][k] + expected[1][0][k]) / 2 for k in RANKS})
    assert report.mean_tpir == pytest.approx({fpir: (expected[0][1][fpir] + expected[1][1][fpir]) / 2 for fpir in FPIR_TARGETS})


def test_every_mode_of_the_whole_evaluation_equals_the_reference(world):
    embeddings, members, scores = world
    templates = templates_of(members, scores)
    first, second = (part.astype(np.int32) for part in np.triu_indices(T, 1))
    owner = np.arange(T) % 7
    pairs = TemplatePairs(first, second, owner[first] == owner[second], repeated=3)
    report = evaluate_templates(embeddings, templates, pairs, None)
    assert (report.genuine + report.impostor, report.repeated, report.embedding_size) == (T * (T - 1) // 2, 3, D)
    assert report.unresolved_far == (1e-6, 1e-5, 1e-4)
    assert list(report.modes) == [str(mode) for mode in MODES]
    for mode in MODES:
        vectors = by_reference(world, mode)
        exact = (vectors[first] * vectors[second]).sum(axis=1)
        genuine, impostor = exact[pairs.same].tolist(), exact[~pairs.same].tolist()
        found = report.modes[str(mode)]
        assert found.search is None
        assert [point.far for point in found.strict] == [point.far for point in found.nearest] == list(FAR_TARGETS[3:])
        for strict, nearest in zip(found.strict, found.nearest, strict=True):
            tar, threshold, reached = reference.strict_tar(genuine, impostor, strict.far)
            assert (strict.tar, strict.reached_far) == (tar, reached)
            assert strict.threshold == pytest.approx(threshold, abs=1e-6)
            assert (nearest.tar, nearest.reached_far) == reference.nearest_tar(genuine, impostor, nearest.far)
    assert (report.curves.genuine, report.curves.impostor) == (report.genuine, report.impostor)
