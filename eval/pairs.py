"""Face verification on pairs of images (LFW, CFP, AgeDB): which pairs show one person?

The embedding of an image and that of its mirror are summed and L2-normalised; a pair's score is the cosine of its two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
    embedding_size: int
    accuracy: PairAccuracy  # thresholds in steps of 0.01 squared distance, as published accuracies were read
    accuracy_exact: PairAccuracy  # thresholds searched exactly
    tar_at_far: tuple[TarAtFar, ...]  # over all pairs, at those of FAR_TARGETS that the impostor pairs resolve
    unresolved_far: tuple[float, ...]  # the others
    seconds: float  # reading and embedding

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds


def evaluate_pairs(embedder: Embedder, pairs: PairSet, progress: Callable[[int, int], None] | None = None) -> PairReport:
    """Embed every image of the pairs once and score them.

    Args:
        embedder: any model, see ``eval.embedder``.
        pairs: a folder's (``eval.pairs_file.find_pairs``) or a pack's (``eval.pair_pack.open_pack``).
        progress: called as (images done, images in all) after each batch.
    Raises: EvalError that names the image when it is unreadable, of another size, or its embedding is not finite.
    """
    start = time.perf_counter()
    embeddings = _embed_images(embedder, pairs, progress)
    seconds = time.perf_counter() - start
    first, second = embeddings[pairs.pairs[:, 0]], embeddings[pairs.pairs[:, 1]]
    scores, same = (first * second).sum(axis=1), pairs.same
    num_impostor = int(np.count_nonzero(~same))
    return PairReport(
        num_pairs=len(scores),
        num_images=len(embeddings),
        embedding_size=embeddings.shape[1],
        accuracy=kfold_accuracy(scores, same, pairs.fold, FIELD_GRID),
        accuracy_exact=kfold_accuracy(scores, same, pairs.fold),
        tar_at_far=tuple(tar_at_far(scores, same, far) for far in FAR_TARGETS if can_resolve(far, num_impostor)),
        unresolved_far=tuple(far for far in FAR_TARGETS if not can_resolve(far, num_impostor)),
        seconds=seconds,
    )


def _embed_images(embedder: Embedder, pairs: PairSet, progress: Callable[[int, int], None] | None) -> np.ndarray:
    """[n, D] float64 unit rows, one per image."""
    rows, total = [], len(pairs.names)
    for start in range(0, total, embedder.batch_size):
        batch = range(start, min(start + embedder.batch_size, total))
        images = np.stack([pairs.decode(image) for image in batch])
        embeddings = embedder(images).astype(np.float64) + embedder(images[:, :, ::-1])
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        bad = ~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0))
        if bad.any():
            raise EvalError(
                f"{pairs.names[batch[int(np.argmax(bad))]]}: its embedding is zero or not finite ({bad.sum()} of {len(batch)} in its "
                f"batch); check {embedder.source} and its input range, {embedder.input_range}"
            )
        rows.append(embeddings / norms)
        if progress:
            progress(batch.stop, total)
    return np.concatenate(rows)
