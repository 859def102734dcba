"""Face verification on pairs of images (LFW, CFP, AgeDB): which pairs show one person?

The embedding of an image and that of its mirror are summed and L2-normalised; a pair's score is the cosine of its two.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bootstrap import PairIntervals, pair_intervals
from eval.curves import ScoreCurves, score_curves
from eval.embed import embed
from eval.embedder import Embedder
from eval.errors import EvalError
from eval.pair_set import PairSet
from eval.verification import FIELD_GRID, PairAccuracy, TarAtFar, can_resolve, kfold_accuracy, tar_at_far

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class PairReport:
    """What ``evaluate_pairs`` found."""

    num_pairs: int
    num_images: int  # distinct, each embedded twice (itself and its mirror)
    repeated: int  # of the pairs: here again, and counted each time
    self_pairs: int  # of an image with itself
    embedding_size: int
    accuracy: PairAccuracy  # thresholds in steps of 0.01 squared distance, as published accuracies were read
    accuracy_exact: PairAccuracy  # thresholds searched exactly
    tar_at_far: tuple[TarAtFar, ...]  # over all pairs, at those of FAR_TARGETS that the impostor pairs resolve
    unresolved_far: tuple[float, ...]  # the others
    intervals: PairIntervals  # of accuracy and TAR
    curves: ScoreCurves | None  # None where all pairs are of one kind
    seconds: float  # reading and embedding

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds


def evaluate_pairs(embedder: Embedder, pairs: PairSet, **options: Any) -> PairReport | None:
    """Embed every image of the pairs once and score them.

    Args:
        embedder: any model, see ``eval.embedder``.
        pairs: a folder's (``eval.pairs_file.find_pairs``) or a pack's (``eval.pair_pack.open_pack``).
        options: of ``eval.embed.embed``: group, decoder, cache, progress.
    Returns: the report on the first rank of the group, None on the others.
    Raises: EvalError that names the image when it is unreadable, of another size, or its embedding is not finite.
    Collectives: those of ``embed``.
    """
    start = time.perf_counter()
    rows = embed(embedder, pairs.images, mirror=True, **options)
    seconds = time.perf_counter() - start
    if rows is None:
        return None
    embeddings = _unit_sums(rows, pairs.images.names, embedder)
    first, second = embeddings[pairs.pairs[:, 0]], embeddings[pairs.pairs[:, 1]]
    scores, same = (first * second).sum(axis=1), pairs.same
    num_impostor = int(np.count_nonzero(~same))
    resolved = tuple(far for far in FAR_TARGETS if can_resolve(far, num_impostor))
    accuracy, accuracy_exact = kfold_accuracy(scores, same, pairs.fold, FIELD_GRID), kfold_accuracy(scores, same, pairs.fold)
    return PairReport(
        num_pairs=len(scores),
        num_images=len(embeddings),
        repeated=pairs.repeated,
        self_pairs=pairs.self_pairs,
        embedding_size=embeddings.shape[1],
        accuracy=accuracy,
        accuracy_exact=accuracy_exact,
        tar_at_far=tuple(tar_at_far(scores, same, far) for far in resolved),
        unresolved_far=tuple(far for far in FAR_TARGETS if far not in resolved),
        intervals=pair_intervals(scores, pairs, resolved, accuracy, accuracy_exact),
        curves=score_curves(scores[same], scores[~same]) if 0 < num_impostor < len(scores) else None,
        seconds=seconds,
    )


def _unit_sums(rows: np.ndarray, names: Sequence[str], embedder: Embedder) -> np.ndarray:
    """[n, D] float64: each image's embedding and its mirror's, [n, 2, D], summed and L2-normalised."""
    sums = rows.astype(np.float64).sum(axis=1)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    if not norms.all():
        name = names[int(np.argmin(norms))]
        raise EvalError(f"{name}: its embedding and its mirror's add up to zero; check {embedder.source} and its input range")
    return sums / norms
