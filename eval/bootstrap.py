"""Confidence intervals of pair verification: a bootstrap over identities.

Pairs are not independent: a person who is hard to recognise spoils each of that person's pairs, genuine and impostor, and an interval that
takes pairs for independent is too narrow. So whole persons are resampled. A replicate draws as many identities as there are, with
replacement; identity i is drawn m_i times, and each draw counts as a person of its own:

- a genuine pair of i then exists once per draw, its weight is m_i. This is the subsets bootstrap of Bolle, Ratha and Pankanti ("Error
  analysis of pattern recognition systems", CVIU 93, 2004): all genuine scores of a person are drawn together;
- an impostor pair of i and j exists once for each draw of i with each of j, its weight is m_i m_j: the pigeonhole bootstrap of Owen (Annals
  of Applied Statistics 1, 2007), for pairs known as vertex bootstrap. Two draws of one identity are no impostor pair: they are left out.

The interval lies between the percentiles of the statistic over the replicates. Fogliato, Patil and Perona (arXiv:2306.01198) compare such
intervals for 1:1 matching. As they find, one made by a bootstrap is too narrow where errors are a handful, and it says nothing where there
are none: then there is none here. Identities must not be few either: in the simulation of tests/unit/test_bootstrap.py (persons with a
strong bias of their own, TAR at FAR 0.05) the 95 % interval held the truth in 0.95 of 400 data sets of 60 persons, in 0.93 of 20 persons,
in 0.85 of 10. With pairs resampled as if they were independent it was 0.61 of those of 60 persons.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from eval.errors import EvalError
from eval.pair_set import PairSet
from eval.verification import PairAccuracy

CONFIDENCE = 0.95
REPLICATES = 1000
SEED = 0
_CHUNK = 4_000_000  # weights at a time, 32 MB


@dataclass(frozen=True)
class Interval:
    """Bounds of a share in [0, 1], at ``CONFIDENCE``."""

    low: float
    high: float


@dataclass(frozen=True)
class PairIntervals:
    """Of the numbers of a ``PairReport``; None where the pairs do not tell, see ``percentile_interval``."""

    confidence: float
    replicates: int
    seed: int
    identities: int  # that were resampled: those of the pairs
    identities_inferred: bool  # from the genuine pairs, because the source names no people, see ``PairSet.identities``
    accuracy: Interval | None
    accuracy_exact: Interval | None
    tar_at_far: tuple[Interval | None, ...]  # in the order of the targets


def pair_intervals(
    scores: ArrayLike, pairs: PairSet, far_targets: Sequence[float], accuracy: PairAccuracy, accuracy_exact: PairAccuracy
) -> PairIntervals:
    """Intervals of TAR at ``far_targets``, whose threshold every replicate chooses anew, and of two accuracies.

    An accuracy is that of all pairs together, each judged at the threshold of its own fold as it was chosen on the real pairs. Choosing it
    anew would let copies of a person stand both in a fold and in those that its threshold is chosen on. What the choice of nine tenths of
    the pairs adds to the uncertainty is therefore not in the interval.
    """
    scores = np.asarray(scores, dtype=np.float64)
    right = [(scores >= np.array(each.thresholds)[pairs.fold]) == pairs.same for each in (accuracy, accuracy_exact)]
    identities = pairs.identities[pairs.pairs]
    values = bootstrap(scores, pairs.same, identities, far_targets, right)
    *tars, first, second = map(percentile_interval, values.T)
    return PairIntervals(
        confidence=CONFIDENCE,
        replicates=REPLICATES,
        seed=SEED,
        identities=len(np.unique(identities)),
        identities_inferred=pairs.named_identities is None,
        accuracy=first,
        accuracy_exact=second,
        tar_at_far=tuple(tars),
    )


def percentile_interval(values: np.ndarray) -> Interval | None:
    """Of a statistic over its replicates, [R]: as much of them below as above, between neighbours linearly.

    None where they know no interval: all are equal (no error was seen, or nothing but errors), or some are NaN (a replicate without a
    genuine or without an impostor pair, because identities are too few).
    """
    if np.isnan(values).any() or values.min() == values.max():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def bootstrap(
    scores: ArrayLike,
    same: ArrayLike,
    identities: ArrayLike,
    far_targets: Sequence[float],
    right: Sequence[ArrayLike] = (),
    *,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> np.ndarray:
    """Statistics of resampled pairs, see above.

    A pair counts as the genuine pair of a single person when both of its identities are equal, whatever ``same`` says of it: inferred
    identities can hold an impostor pair, where a list of pairs contradicts itself.

    Args:
        scores: [P] similarity, finite; same: [P] bool, True for pairs of one person.
        identities: [P, 2] int, of the pair's two images.
        far_targets: T of them; the TAR of a replicate is the highest whose FAR is at most the target, both weighted.
        right: A times [P] bool, whether a pair is judged right.
    Returns: [replicates, T + A] float64: TAR at each target, then the share of the pairs judged right; NaN where a replicate holds no
        genuine or no impostor pair. The same numbers for the same seed.
    """
    scores, same = np.asarray(scores, dtype=np.float64), np.asarray(same, dtype=bool)
    people, members = np.unique(np.asarray(identities), return_inverse=True)
    if not len(scores) or not members.size == 2 * same.size == 2 * scores.size:
        raise EvalError(f"expected P > 0 scores, P times same and [P, 2] identities, got {len(scores)}, {len(same)} and {members.size}")
    first, second = members.reshape(-1, 2).T
    tar = _ReplicateTar(scores, same, far_targets)
    right = np.array([np.asarray(each, dtype=np.float64) for each in right]).reshape(-1, len(scores))
    random = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // max(len(scores), len(people)))
    values = []
    for start in range(0, replicates, chunk):
        draws = random.multinomial(len(people), np.full(len(people), 1 / len(people)), min(chunk, replicates - start))  # [r, n]
        weights = draws[:, first] * np.where(first == second, 1, draws[:, second])  # [r, P]
        known = (weights[:, same].any(axis=1) & weights[:, ~same].any(axis=1))[:, None]
        with np.errstate(invalid="ignore"):  # 0 / 0, which is made NaN anyway
            shares = np.concatenate([tar(weights), weights @ right.T / weights.sum(axis=1, keepdims=True)], axis=1)
        values.append(np.where(known, shares, np.nan))
    return np.concatenate(values)


class _ReplicateTar:
    """TAR at FAR targets for many weightings of the same scores, which are sorted once."""

    def __init__(self, scores: np.ndarray, same: np.ndarray, far_targets: Sequence[float]):
        falling = np.argsort(-scores)
        self._targets = far_targets
        self._genuine, self._impostor = falling[same[falling]], falling[~same[falling]]
        impostor, genuine = scores[self._impostor], scores[self._genuine]
        levels = np.unique(impostor)[::-1]  # ties are accepted together
        self._level_ends = np.searchsorted(-impostor, -levels, side="right")  # impostors down to each level
        self._above = np.append(np.searchsorted(-genuine, -levels, side="left"), len(genuine))  # genuine above it; the last: all

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """[r, T] float64 of weights [r, P]."""
        rows = np.arange(len(weights))
        false = np.cumsum(weights[:, self._impostor], axis=1)  # exact: integers
        true = np.cumsum(weights[:, self._genuine], axis=1)
        true = np.concatenate([np.zeros((len(weights), 1), true.dtype), true], axis=1)
        fars = false[:, self._level_ends - 1] / false[:, -1:]
        # The more levels are accepted, the higher the FAR; what lies above the first refused level is accepted.
        accepted = [self._above[np.count_nonzero(fars <= far, axis=1)] for far in self._targets]
        return np.array([true[rows, count] / true[:, -1] for count in accepted]).T.reshape(len(weights), -1)
