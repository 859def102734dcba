"""The 1:1 protocol of IJB: scores of millions of pairs of templates, and TAR@FAR in two readings.

``strict`` is this project's rule: the highest TAR whose FAR is at most the target. ``nearest`` is how published IJB figures were read:
the TAR at the point of scikit-learn's ROC curve whose FAR is nearest to the target, be it below or above. That curve has a point for every
distinct score, but by default (``drop_intermediate``) leaves out those that lie evenly on a line between their neighbours, and the field
reads it so. Of points equally near the one of the lower threshold counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from eval.ijb_pairs import TemplatePairs
from eval.verification import tar_at_far_of_sorted

FAR_TARGETS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
BLOCK = 256  # templates that are scored with all others at once


@dataclass(frozen=True)
class TarPoint:
    """A TAR, and where it was read: pairs with a score of ``threshold`` or more are accepted."""

    far: float  # target
    tar: float
    threshold: float
    reached_far: float  # at the threshold


def score_pairs(features: np.ndarray, pairs: TemplatePairs, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Dot products of pairs of rows.

    Scores a block of templates with all others in one matrix product, and picks: much faster than fetching two rows a pair, wherever a
    template is in hundreds of pairs.

    Args:
        features: [T, D] float32.
        progress: called as (pairs done, pairs in all).
    Returns: [P] float32, in the order of the pairs.
    """
    scores = np.empty(len(pairs.first), np.float32)
    starts = np.arange(0, len(features), BLOCK)
    bounds = [*np.searchsorted(pairs.first, starts).tolist(), len(pairs.first)]
    for start, begin, end in zip(starts.tolist(), bounds[:-1], bounds[1:], strict=True):
        if begin == end:
            continue
        block = features[start : start + BLOCK] @ features.T
        scores[begin:end] = block[pairs.first[begin:end] - start, pairs.second[begin:end]]
        if progress:
            progress(end, len(scores))
    return scores


def strict_tars(genuine: np.ndarray, impostor: np.ndarray, fars: Iterable[float]) -> tuple[TarPoint, ...]:
    """Of ascending scores, [G] and [I]. Raises: EvalError for a FAR that the impostor pairs can't resolve."""
    found = [tar_at_far_of_sorted(genuine, impostor, far) for far in fars]
    return tuple(TarPoint(point.far_target, point.tar, point.threshold, point.far) for point in found)


def nearest_tars(genuine: np.ndarray, impostor: np.ndarray, fars: Iterable[float]) -> tuple[TarPoint, ...]:
    """The field's reading, see above. Of finite ascending scores, [G] and [I], neither empty."""
    false, true, thresholds = _roc(genuine, impostor)
    return tuple(_nearest(far, false, true, thresholds, len(genuine), len(impostor)) for far in fars)


def _roc(genuine: np.ndarray, impostor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The curve's points by falling threshold: false and true accepts, int32, and thresholds. Without its first, which accepts no pair."""
    scores = np.concatenate([genuine, impostor])
    scores.sort()
    below = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]])).astype(np.int32)  # scores lower than each distinct one
    thresholds, accepted = scores[below][::-1], (len(scores) - below)[::-1]
    true = (len(genuine) - np.searchsorted(genuine, thresholds[::-1]).astype(np.int32))[::-1]
    false = accepted - true
    if len(false) > 2:
        kept = np.concatenate([[True], (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0), [True]])
        false, true, thresholds = false[kept], true[kept], thresholds[kept]
    return false, true, thresholds


def _nearest(far: float, false: np.ndarray, true: np.ndarray, thresholds: np.ndarray, genuine: int, impostor: int) -> TarPoint:
    after = int(np.searchsorted(false, np.int32(math.ceil(far * impostor))))  # int32: else searching would convert all counts
    counts = [0, *false[max(after - 1, 0) : after + 1].tolist()]  # 0: the point that accepts no pair
    count = min(counts, key=lambda count: (abs(count / impostor - far), -count))
    last = int(np.searchsorted(false, np.int32(count), side="right")) - 1  # of points of this FAR the one of the highest TAR
    if last < 0:
        return TarPoint(far, 0.0, float(np.nextafter(thresholds[0], np.inf)), 0.0)
    return TarPoint(far, float(true[last] / genuine), float(thresholds[last]), count / impostor)
