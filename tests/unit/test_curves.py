"""Curves of scores agree with the numbers that are reported of the same scores."""

import itertools
import math

import numpy as np
import pytest

from eval.curves import NUM_BINS, score_curves
from eval.verification import tar_at_far


@pytest.mark.parametrize("seed", range(60))
def test_every_point_of_the_roc_is_the_tar_at_its_far(seed):
    """Random sizes, separations and ties, as float32 and float64."""
    rng = np.random.default_rng(seed)
    genuine, impostor = (rng.normal(size=rng.integers(1, limit)) for limit in (60, 700))
    genuine += rng.uniform(-1, 4)
    digits = rng.integers(0, 4)  # 0 and 1 make many ties
    genuine, impostor = (np.round(scores, digits).astype(rng.choice(["f4", "f8"])) for scores in (genuine, impostor))
    found = score_curves(genuine, impostor)
    scores = np.concatenate([genuine, impostor], dtype=np.float64)
    same = np.arange(len(scores)) < len(genuine)
    assert (found.genuine, found.impostor) == (len(genuine), len(impostor))
    assert found.far == sorted(found.far)
    assert (found.far[0], found.far[-1], found.tar[-1]) == (1 / len(impostor), 1, 1)
    for far, tar in zip(found.far, found.tar, strict=True):
        assert tar == pytest.approx(tar_at_far(scores, same, far).tar, abs=1e-12)


@pytest.mark.parametrize("count", [3, 7, 10, 49, 1000, 3000])
def test_points_at_whole_numbers_of_false_accepts_may_use_them_up(count):
    """k / count times count is not always k in floating point."""
    impostor = np.arange(count, dtype=np.float64)
    found = score_curves(impostor + 0.5, impostor)
    for far, tar in zip(found.far, found.tar, strict=True):
        false_accepts = max(k for k in range(count + 1) if k / count <= far)
        assert tar == pytest.approx(min(1, (false_accepts + 1) / count))


def test_histograms_hold_every_score_once():
    rng = np.random.default_rng(0)
    found = score_curves(rng.normal(2, 1, 500), rng.normal(0, 1, 3000))
    assert len(found.edges) == NUM_BINS + 1
    assert (sum(found.genuine_counts), sum(found.impostor_counts)) == (500, 3000)
    equal = score_curves([0.25, 0.25], [0.25])
    assert (sum(equal.genuine_counts), sum(equal.impostor_counts)) == (2, 1)
    assert all(low < high for low, high in zip(equal.edges, equal.edges[1:], strict=False))


def test_scores_that_differ_by_rounding_alone_have_histograms_whose_edges_rise():
    """Of a network that embeds all faces alike; report refuses other edges."""
    found = score_curves([1.0, math.nextafter(1, 0)], [math.nextafter(1, 0)])
    assert all(low < high for low, high in itertools.pairwise(found.edges))
    assert (sum(found.genuine_counts), sum(found.impostor_counts)) == (2, 1)


def test_points_lie_evenly_over_the_decades():
    far = np.array(score_curves([1.0], np.arange(10_000)).far)
    assert len(far) == 80
    assert np.diff(np.log10(far)) == pytest.approx([4 / 79] * 79)
    assert math.isclose(far[0], 1e-4)
