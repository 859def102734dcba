"""The one way from images to embeddings: in batches, spread over ranks, and kept for the next time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from eval.cache import EmbeddingCache, description, image_digest
from eval.decoding import decode_ahead, in_threads, num_threads
from eval.embedder import Embedder
from eval.errors import EvalError
from eval.images import FaceImages
from model.vit import IMAGE_SIZE

T = TypeVar("T")

BATCHES_BETWEEN_GATHERS = 8  # of each rank
HASHED = 1024  # images in a batch that is hashed alone
Progress = Callable[[int, int], None]
Allocate = Callable[[tuple[int, ...]], np.ndarray]  # shape -> float32 to fill


def embed(
    embedder: Embedder,
    images: FaceImages,
    *,
    mirror: bool,
    group: dist.ProcessGroup | None = None,
    decoder: str = "pillow",
    cache: EmbeddingCache | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> np.ndarray | None:
    """Embed every image once.

    Ranks take equal shares, forward for forward, so that a model that is spread over them (ZeRO 3) works too; where images do not suffice
    for that a rank repeats one, and its embedding is dropped.

    Args:
        embedder: any model, see ``eval.embedder``; the same on every rank.
        mirror: embed each image's mirror too.
        group: ranks that share the work; None is this process alone.
        decoder: one of ``eval.decoding.DECODERS``.
        cache: where embeddings are looked up and kept; the first rank's counts.
        progress: makes what is called as (done, in all) after each batch, from the plural of what is counted. While images are embedded
            every rank calls it equally often.
    Returns: on the first rank [n, 2, D] float32, each image and its mirror, or [n, 1, D] without mirrors, not normalised; from a cache it
        is read-only and lies on the disk. None on the others.
    Raises: EvalError on every rank that names the image when it is unreadable, of another size, or its embedding is zero or not finite, or
        the file of the cache that cannot be written.
    Collectives: a gather of texts and one of embeddings for every BATCHES_BETWEEN_GATHERS batches, and one of texts; with a cache three
        more of texts and two of values; where its entry is there, two and two, and no others.
    """
    ranks = _Ranks.of(group)

    def fill(allocate: Allocate) -> np.ndarray | None:
        return _embed(embedder, images, mirror, ranks, decoder, allocate, progress and progress("images"))

    if cache is None:
        return fill(_in_memory)
    digests = _digests(images, ranks, progress and progress("images hashed"))
    entry = ranks.on_first(lambda: cache.entry(description(embedder.digest, digests, mirror, decoder)))
    cache.hit = any(ranks.gather(entry is not None and entry.rows is not None))
    if not cache.hit:
        try:
            fill(entry.allocate if entry else _in_memory)
            ranks.on_first(lambda: entry.commit())
        finally:
            if entry:
                entry.discard()
    return entry.rows if entry else None


def _in_memory(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.float32)


def _embed(
    embedder: Embedder,
    images: FaceImages,
    mirror: bool,
    ranks: _Ranks,
    decoder: str,
    allocate: Allocate,
    progress: Progress | None,
) -> np.ndarray | None:
    total, rows, problem = len(images), None, None
    chunks = list(_chunks(total, embedder.batch_size, ranks.world_size))
    batches = [batch for chunk in chunks for batch in chunk.batches(ranks.rank)]
    with closing(decode_ahead(images, batches, decoder, embedder.device)) as decoded:
        for chunk in chunks:
            parts = []
            for number, batch in enumerate(chunk.batches(ranks.rank), 1):
                pixels = next(decoded)
                if isinstance(pixels, EvalError):
                    problem = problem or str(pixels)
                    pixels = torch.zeros(len(batch), IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)  # the others wait for this forward
                try:
                    parts.append(_views(embedder, pixels, mirror))
                    if problem is None:
                        _check(parts[-1], batch, images, embedder)
                except EvalError as error:
                    problem = problem or str(error)
                if progress:
                    progress(min(chunk.start + number * embedder.batch_size * ranks.world_size, chunk.stop), total)
            ranks.raise_any(problem)
            gathered = ranks.gather_rows(np.concatenate(parts))
            if gathered is not None:
                try:
                    rows = allocate((total, *gathered.shape[1:])) if rows is None else rows
                except OSError as error:  # which the others hear of with the next problem
                    problem = str(error)
                    continue
                rows[chunk.start : chunk.stop] = gathered[: chunk.stop - chunk.start]
    ranks.raise_any(problem)
    return rows


def _views(embedder: Embedder, pixels: torch.Tensor, mirror: bool) -> np.ndarray:
    views = [embedder(pixels)]
    if mirror:
        views.append(embedder(pixels.flip(2)))
    return np.stack(views, axis=1)


def _check(rows: np.ndarray, batch: range, images: FaceImages, embedder: Embedder) -> None:
    norms = np.linalg.norm(rows, axis=(1, 2))
    bad = ~(np.isfinite(norms) & (norms > 0))
    if bad.any():
        raise EvalError(
            f"{images.names[batch[int(np.argmax(bad))]]}: its embedding is zero or not finite ({bad.sum()} of {len(batch)} in its "
            f"batch); check {embedder.source} and its input range, {embedder.input_range}"
        )


@dataclass(frozen=True)
class _Chunk:
    """Images [start, stop), embedded between two gathers: rank r takes the r-th of equal parts of them."""

    start: int
    stop: int
    batch_size: int
    world_size: int

    def batches(self, rank: int) -> list[list[int]]:
        """Equally many, of equal sizes, on every rank: beyond the last image, the last image again."""
        each = -(-(self.stop - self.start) // self.world_size)
        first = self.start + rank * each
        mine = [min(image, self.stop - 1) for image in range(first, first + each)]
        return [mine[at : at + self.batch_size] for at in range(0, each, self.batch_size)]


def _chunks(total: int, batch_size: int, world_size: int) -> Iterator[_Chunk]:
    size = batch_size * world_size * BATCHES_BETWEEN_GATHERS
    for start in range(0, total, size):
        yield _Chunk(start, min(start + size, total), batch_size, world_size)


def _digests(images: FaceImages, ranks: _Ranks, progress: Progress | None) -> list[bytes]:
    """Of every image, in order, on every rank; each rank hashes its share."""
    mine, problem = [], None
    share = range(ranks.rank, len(images), ranks.world_size)
    batches = (share[start : start + HASHED] for start in range(0, len(share), HASHED))
    with closing(in_threads(lambda image: image_digest(images, image), batches, num_threads())) as hashed:
        for batch in hashed:
            if isinstance(batch, EvalError):
                problem = str(batch)
                break
            mine += batch
            if progress:
                progress(min(len(mine) * ranks.world_size, len(images)), len(images))
    ranks.raise_any(problem)
    shares = ranks.gather(mine)
    return [shares[image % ranks.world_size][image // ranks.world_size] for image in range(len(images))]


@dataclass(frozen=True)
class _Ranks:
    """The processes of a group; None is this one alone."""

    group: dist.ProcessGroup | None
    rank: int
    world_size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Ranks:
        return cls(None, 0, 1) if group is None else cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, value: object) -> list:
        values = [value] * self.world_size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def raise_any(self, problem: str | None) -> None:
        """Raise the first rank's problem on all."""
        problems = [text for text in self.gather(problem) if text is not None]
        if problems:
            raise EvalError(problems[0])

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Run an action without collectives on the first rank; what it returns there, None on the others. What it raises, all raise."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action()
            except (EvalError, OSError) as error:
                problem = str(error)
        self.raise_any(problem)
        return result

    def gather_rows(self, rows: np.ndarray) -> np.ndarray | None:
        """[b, ...] of each rank -> [b * world_size, ...] in rank order, on the first; None on the others."""
        if self.group is None:
            return rows
        on_gpu = dist.get_backend(self.group) == "nccl"
        mine = torch.from_numpy(rows).cuda() if on_gpu else torch.from_numpy(rows)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(mine, parts, group=self.group, group_dst=0)
        return torch.cat(parts).cpu().numpy() if parts else None
