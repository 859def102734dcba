"""The one way from images to embeddings: in batches, and over ranks."""

from collections.abc import Callable

import numpy as np

from eval.embedder import Embedder
from eval.errors import EvalError
from eval.images import FaceImages


def embed(
    embedder: Embedder,
    images: FaceImages,
    *,
    mirror: bool,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Embed every image once.

    Args:
        embedder: any model, see ``eval.embedder``.
        mirror: embed each image's mirror too.
        progress: called as (images done, images in all) after each batch.
    Returns: [n, 2, D] float32, each image and its mirror, or [n, 1, D] without mirrors; not normalised.
    Raises: EvalError that names the image when it is unreadable, of another size, or its embedding is zero or not finite.
    """
    rows, total = [], len(images)
    for start in range(0, total, embedder.batch_size):
        batch = range(start, min(start + embedder.batch_size, total))
        pixels = np.stack([images.decode(image) for image in batch])
        views = [embedder(pixels), embedder(np.ascontiguousarray(pixels[:, :, ::-1]))] if mirror else [embedder(pixels)]
        rows.append(np.stack(views, axis=1))
        norms = np.linalg.norm(rows[-1], axis=(1, 2))
        bad = ~(np.isfinite(norms) & (norms > 0))
        if bad.any():
            raise EvalError(
                f"{images.names[batch[int(np.argmax(bad))]]}: its embedding is zero or not finite ({bad.sum()} of {len(batch)} in its "
                f"batch); check {embedder.source} and its input range, {embedder.input_range}"
            )
        if progress:
            progress(batch.stop, total)
    return np.concatenate(rows)
