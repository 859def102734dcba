"""Verification scores to numbers: accuracy over folds and TAR@FAR, in numpy float64.

One rule throughout: a pair is accepted as the same person when its score is at least the threshold.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from eval.errors import EvalError

# What the field's LFW scripts search: squared distances 2 - 2 cos from 0 to 3.99 in steps of 0.01, here as cosines, ascending. A coarse
# grid, but published accuracies were read on it.
FIELD_GRID = 1 - np.arange(399, -1, -1) / 200


@dataclass(frozen=True)
class PairAccuracy:
    """Accuracy over folds; ``accuracies[i]`` and ``thresholds[i]`` belong to fold i, held out."""

    mean: float  # share of pairs judged right, in [0, 1], mean over folds
    std: float  # population standard deviation over folds (divisor: number of folds), as the field reports it
    accuracies: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class TarAtFar:
    """True accept rate at a false accept rate."""

    far_target: float
    tar: float
    far: float  # reached at ``threshold``; at most far_target
    threshold: float
    genuine: int  # pairs of one person
    impostor: int  # pairs of two persons


def kfold_accuracy(scores: ArrayLike, same: ArrayLike, folds: int | ArrayLike = 10, candidates: ArrayLike | None = None) -> PairAccuracy:
    """Accuracy on each fold at the threshold that is best on the other folds.

    Of equally good thresholds the highest (strictest) is taken.

    Args:
        scores: [P] similarity, higher means more alike.
        same: [P] bool, True for pairs of one person.
        folds: [P] int, the fold of each pair, see ``count_folds``; or a number, for ``contiguous_folds``.
        candidates: thresholds to choose among, ascending, such as ``FIELD_GRID``. None searches exactly: every partition that the other
            folds' scores allow, the threshold midway between two neighbouring distinct scores, or accepting all, or none.
    Raises: EvalError for unequal lengths, scores that are not finite, fewer than two folds, or a fold without a pair.
    """
    scores, same = _checked(scores, same)
    folds = contiguous_folds(len(scores), folds) if np.ndim(folds) == 0 else np.asarray(folds)
    num_folds = count_folds(folds)
    if folds.shape != scores.shape:
        raise EvalError(f"{len(folds)} folds given for {len(scores)} pairs, expected the fold of each pair")
    accuracies, thresholds = [], []
    for fold in range(num_folds):
        held_out, rest = folds == fold, folds != fold
        cuts = _every_cut(scores[rest]) if candidates is None else np.asarray(candidates, dtype=np.float64)
        threshold = _best_threshold(cuts, scores[rest], same[rest])
        thresholds.append(threshold)
        accuracies.append(float(np.mean((scores[held_out] >= threshold) == same[held_out])))
    return PairAccuracy(float(np.mean(accuracies)), float(np.std(accuracies)), tuple(accuracies), tuple(thresholds))


def contiguous_folds(num_pairs: int, num_folds: int) -> np.ndarray:
    """Cut pairs into folds in their order; the first ``num_pairs % num_folds`` folds hold one pair more.

    This is how the field cuts the pairs of a pack (scikit-learn's KFold without shuffling).
    Returns: [P] int64, the fold of each pair. Raises: EvalError for fewer than two folds or a fold without a pair.
    """
    if not 2 <= num_folds <= num_pairs:
        raise EvalError(f"{num_folds} folds of {num_pairs} pairs: need at least 2 folds and a pair in each")
    each, more = divmod(num_pairs, num_folds)
    return np.repeat(np.arange(num_folds), [each + (fold < more) for fold in range(num_folds)])


def count_folds(folds: np.ndarray) -> int:
    """Number of folds, where ``folds`` [P] int holds the fold of each pair.

    Raises: EvalError unless the folds are numbered 0, 1, ... without a gap, two at least: each one's threshold is chosen on the others.
    """
    if folds.ndim != 1 or not np.issubdtype(folds.dtype, np.integer):
        raise EvalError(f"expected the fold of each pair, integers [P], got {folds.dtype} {list(folds.shape)}")
    found = np.unique(folds)
    if not np.array_equal(found, np.arange(len(found))):
        raise EvalError(f"{len(found)} folds numbered {found[0]} to {found[-1]}, expected 0 to {len(found) - 1}, with a pair in each")
    if len(found) < 2:
        raise EvalError("one fold; accuracy needs two or more, to choose each one's threshold on the others")
    return len(found)


def tar_at_far(scores: ArrayLike, same: ArrayLike, far: float) -> TarAtFar:
    """The highest TAR whose FAR is at most ``far``: the TAR at the lowest observed score that is such a threshold.

    Args:
        scores: [P] similarity; same: [P] bool; far: target in (0, 1].
    Raises: EvalError when the impostor pairs can't resolve the target (1e-6 needs a million of them), or a class is missing.
    """
    scores, same = _checked(scores, same)
    return tar_at_far_of_sorted(np.sort(scores[same]), np.sort(scores[~same]), far)


def tar_at_far_of_sorted(genuine: np.ndarray, impostor: np.ndarray, far: float) -> TarAtFar:
    """The same from scores of the two classes, [G] and [I], finite, ascending, float32 or float64: no pass over all of them.

    Raises: as ``tar_at_far``.
    """
    if not 0 < far <= 1:
        raise EvalError(f"FAR target must lie in (0, 1], got {far}")
    if not len(genuine) or not can_resolve(far, len(impostor)):
        raise EvalError(
            f"TAR@FAR={far:g} needs at least 1 genuine and {1 / far:.0f} impostor pairs, found {len(genuine)} and {len(impostor)}"
        )
    allowed = most_false_accepts(far, len(impostor))
    number = np.result_type(genuine, impostor).type  # else searching would convert all scores
    refused = impostor[-1 - allowed] if allowed < len(impostor) else -np.inf  # the highest impostor that may not be accepted
    threshold = _above(number(max(genuine[-1], impostor[-1])))  # accepts no pair
    for scores in (genuine, impostor):
        above = int(np.searchsorted(scores, number(refused), side="right"))
        threshold = min(threshold, float(scores[above])) if above < len(scores) else threshold
    accepted, wrong = (int(_num_accepted(scores, number(threshold))) for scores in (genuine, impostor))
    return TarAtFar(far, accepted / len(genuine), wrong / len(impostor), threshold, len(genuine), len(impostor))


def can_resolve(far: float, num_impostor: int) -> bool:
    """Whether one false accept among ``num_impostor`` pairs is no more than the target."""
    return num_impostor > 0 and 1 / num_impostor <= far


def most_false_accepts(far: float, num_impostor: int) -> int:
    """How many of the impostor pairs may be accepted: the most whose share of all is at most ``far``, as floats compare."""
    most = min(int(far * num_impostor), num_impostor)
    while most < num_impostor and (most + 1) / num_impostor <= far:
        most += 1
    while most / num_impostor > far:
        most -= 1
    return most


def _every_cut(scores: np.ndarray) -> np.ndarray:
    """A threshold for each way to part ``scores`` into accepted and refused, ascending: all accepted, midpoints, none accepted."""
    distinct = np.unique(scores)
    low, high = distinct[:-1], distinct[1:]
    middle = low + (high - low) / 2
    middle = np.where(middle > low, middle, high)  # neighbouring floats have no middle
    return np.concatenate([distinct[:1], middle, [_above(distinct[-1])]])


def _best_threshold(candidates: np.ndarray, scores: np.ndarray, same: np.ndarray) -> float:
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    right = _num_accepted(genuine, candidates) + len(impostor) - _num_accepted(impostor, candidates)
    return float(candidates[len(candidates) - 1 - np.argmax(right[::-1])])  # the last of the best: candidates ascend


def _above(score: float) -> float:
    """The next number of its own precision."""
    return float(np.nextafter(score, np.inf))


def _num_accepted(ascending: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")


def _checked(scores: ArrayLike, same: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, same = np.asarray(scores, dtype=np.float64), np.asarray(same)
    if scores.ndim != 1 or scores.shape != same.shape or not len(scores):
        raise EvalError(f"scores and same must be two equally long, non-empty vectors, got shapes {scores.shape} and {same.shape}")
    if same.dtype != bool:
        raise EvalError(f"same must be bool, got {same.dtype}")
    if not np.isfinite(scores).all():
        raise EvalError(f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    return scores, same
