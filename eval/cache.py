"""Embeddings kept on disk, under the hashes of the model and of the images that they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.output import replace_file
from eval.errors import EvalError
from eval.images import FaceImages

FORMAT_VERSION = 1


class EmbeddingCache:
    """A folder of ``KEY.npy`` (float32 [n, views, D], which numpy reads without unpickling) and ``KEY.json``, which says of what they are.

    The key is a hash of all that decides the numbers, up to the rounding of another device or batch size: the model's file and input
    range, every image's bytes and landmarks, what decodes them (DALI on a GPU rounds otherwise than Pillow), and whether mirrors are
    embedded. An entry is there when its JSON is: a kill leaves at most a ``.new`` file, which is safe to delete.
    """

    def __init__(self, folder: Path) -> None:
        """``hit``: whether the last embeddings that were asked for were there; known on the first rank."""
        self._folder = folder
        self.hit = False

    def read(self, about: dict) -> np.ndarray | None:
        """The embeddings, mapped from the disk and read-only; None if there are none. Raises EvalError for a damaged entry."""
        array, description = self._paths(about)
        if not description.is_file():
            return None
        try:
            found = json.loads(description.read_text(encoding="utf-8"))
            rows = np.lib.format.open_memmap(array, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise EvalError(f"{array}: a damaged entry of the cache ({error}); delete it and {description.name}") from error
        fits = isinstance(found, dict) and {key: found.get(key) for key in about} == about
        if not fits or list(rows.shape) != found.get("shape") or rows.dtype != np.float32:
            raise EvalError(f"{array}: is not what {description.name} says; delete both")
        return rows

    def write(self, about: dict, fill: Callable[[Callable[[tuple[int, ...]], np.ndarray]], None]) -> None:
        """Make the entry: ``fill`` is given a function from the shape to the array to fill, which lies on the disk."""
        array, description = self._paths(about)
        self._folder.mkdir(parents=True, exist_ok=True)
        fresh = array.with_name(f".{array.name}.new-{os.getpid()}")
        shapes: list[list[int]] = []

        def allocate(shape: tuple[int, ...]) -> np.ndarray:
            shapes.append(list(shape))
            rows = np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float32, shape=shape)
            try:
                with fresh.open("rb+") as file:  # a disk that is full kills who writes to a mapped file with holes
                    os.posix_fallocate(file.fileno(), 0, fresh.stat().st_size)
            except OSError as error:
                error.filename = os.fspath(fresh)
                raise
            return rows

        try:
            fill(allocate)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(fresh, array)
        finally:
            fresh.unlink(missing_ok=True)
        replace_file(description, json.dumps({**about, "shape": shapes[0]}, indent=2) + "\n")

    def _paths(self, about: dict) -> tuple[Path, Path]:
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        return self._folder / f"{key}.npy", self._folder / f"{key}.json"


def image_digest(images: FaceImages, image: int) -> bytes:
    """SHA-256 of an image: of its file, as it is, and of its landmarks, if it has some."""
    content = hashlib.sha256(images.read(image))
    if images.landmarks is not None:
        content.update(images.landmarks[image].astype("<f8").tobytes())
    return content.digest()


def description(model_digest: str | None, image_digests: list[bytes], mirror: bool, decoder: str) -> dict:
    """Of what embeddings are: the key of the cache. Raises EvalError for a model without a file."""
    if model_digest is None:
        raise EvalError("embeddings of a network that still learns are not cached")
    return {
        "format_version": FORMAT_VERSION,
        "model": model_digest,
        "images": hashlib.sha256(b"".join(image_digests)).hexdigest(),
        "num_images": len(image_digests),
        "mirror": mirror,
        "decoder": decoder,
    }
