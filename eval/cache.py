"""Embeddings kept on disk, under the hashes of the model and of the images that they are of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data_pipeline.output import replace_file
from eval.errors import EvalError
from eval.images import FaceImages
from eval.release_folder import sha256

FORMAT_VERSION = 2


class EmbeddingCache:
    """A folder of ``KEY.json``, which says of what embeddings are and names the array that they are in, ``KEY-DIGEST.npy`` (float32
    [n, views, D], which numpy reads without unpickling), with its SHA-256.

    The key is a hash of all that decides the numbers, up to the rounding of another device or batch size: the model's file and input
    range, every image's bytes and landmarks, what decodes them (DALI on a GPU rounds otherwise than Pillow), and whether mirrors are
    embedded. An entry is there when its JSON is: a kill leaves at most arrays that no JSON names, which are safe to delete.
    """

    def __init__(self, folder: Path) -> None:
        """``hit``: whether the last embeddings that were asked for were there."""
        self._folder = folder
        self.hit = False

    def entry(self, about: dict) -> CacheEntry:
        """Look an entry up; the folder is made. Raises: EvalError for a damaged entry, OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return CacheEntry(self._folder, hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32], about)


class CacheEntry:
    """Embeddings of ``about``: those that are there, or to be filled into what ``allocate`` returns and committed."""

    def __init__(self, folder: Path, key: str, about: dict) -> None:
        """``rows``: the embeddings, mapped from the disk and read-only; None as long as there are none."""
        self._description, self._about = folder / f"{key}.json", about
        self._fresh = folder / f".{key}.npy.new-{os.getpid()}"
        self.rows: np.ndarray | None = self._read() if self._description.is_file() else None

    def _array(self, digest: str) -> Path:
        return self._description.with_name(f"{self._description.stem}-{digest[:16]}.npy")

    def _read(self) -> np.ndarray:
        try:
            found = json.loads(self._description.read_text(encoding="utf-8"))
            array = self._array(found["sha256"])
            rows, digest = np.lib.format.open_memmap(array, mode="r"), sha256(array)
        except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
            raise EvalError(f"{self._description}: a damaged entry of the cache ({error}); delete it") from error
        if found != {**self._about, "shape": list(rows.shape), "sha256": digest} or rows.dtype != np.float32:
            raise EvalError(f"{array}: is not what {self._description.name} says; delete both")
        return rows

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array on the disk, to be filled. Raises: OSError that names the file."""
        rows = np.lib.format.open_memmap(self._fresh, mode="w+", dtype=np.float32, shape=shape)
        try:
            with self._fresh.open("rb+") as file:  # a disk that is full kills who writes to a mapped file with holes
                os.posix_fallocate(file.fileno(), 0, self._fresh.stat().st_size)
        except OSError as error:
            error.filename = os.fspath(self._fresh)
            raise
        return rows

    def commit(self) -> None:
        """Keep what was filled in. Raises: OSError."""
        with self._fresh.open("rb") as file:
            os.fsync(file.fileno())
        digest = sha256(self._fresh)
        array = self._array(digest)
        os.replace(self._fresh, array)
        self.rows = np.lib.format.open_memmap(array, mode="r")
        description = {**self._about, "shape": list(self.rows.shape), "sha256": digest}
        replace_file(self._description, json.dumps(description, indent=2) + "\n")

    def discard(self) -> None:
        """Remove what was not committed."""
        with contextlib.suppress(OSError):
            self._fresh.unlink(missing_ok=True)


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
