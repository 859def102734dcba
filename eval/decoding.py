"""Images decoded for a model, a batch at a time, ahead of it if that is on a GPU: by Pillow in threads, or by DALI."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.errors import EvalError
from eval.images import FaceImages, check_header

DECODERS = ("pillow", "dali")
AHEAD = 2  # batches that are decoded while a GPU works on one; beside a model on the same cores decoding would only hold that up

Batch = Sequence[int]  # numbers of images
Decoded = Iterator[Tensor | EvalError]  # uint8 [b, 112, 112, 3] a batch, or what is wrong with its first bad image


def decode_ahead(images: FaceImages, batches: Iterable[Batch], decoder: str, device: torch.device) -> Decoded:
    """Decode batch after batch, for a GPU AHEAD of them in advance.

    Args:
        decoder: ``pillow`` (aligns too), or ``dali``, for images that are aligned: on a GPU where ``device`` is one.
    Raises: EvalError for ``dali`` and images with landmarks.
    """
    if decoder == "dali" and images.landmarks is not None:
        raise EvalError("DALI decodes aligned faces only, and these are cut out by landmarks; leave --decoder at pillow")
    threads = num_threads()
    ahead = AHEAD if device.type == "cuda" else 0
    return _by_pillow(images, batches, threads, ahead) if decoder == "pillow" else _by_dali(images, batches, device, threads, ahead)


def num_threads() -> int:
    """For ``in_threads``: a launcher gives each rank its part of the cores."""
    return min(16, torch.get_num_threads(), os.cpu_count() or 1)


def _by_pillow(images: FaceImages, batches: Iterable[Batch], threads: int, ahead: int) -> Decoded:
    for batch in in_threads(images.decode, batches, threads, ahead):
        yield batch if isinstance(batch, EvalError) else torch.from_numpy(np.stack(batch))


def _by_dali(images: FaceImages, batches: Iterable[Batch], device: torch.device, threads: int, ahead: int) -> Decoded:
    import nvidia.dali as dali

    from data_pipeline.graph import Decode, dali_reason, decoded, fed, feed_images, run, tensor

    def read(image: int) -> bytes:
        data = images.read(image)
        check_header(data, images.names[image])
        return data

    batches = [list(batch) for batch in batches]
    size = max((len(batch) for batch in batches), default=0)
    pipeline = None
    for batch, files in zip(batches, in_threads(read, batches, threads, ahead), strict=True):
        if isinstance(files, EvalError):
            yield files
            continue
        if pipeline is None:  # a failure inside leaves a pipeline unusable
            place = device.index or 0 if device.type == "cuda" else None
            pipeline = dali.Pipeline(batch_size=size, num_threads=threads, device_id=place, exec_dynamic=False, prefetch_queue_depth=1)
            with pipeline:
                pipeline.set_outputs(decoded(fed(["encoded"])["encoded"], Decode()))
            pipeline.build()
        try:
            feed_images(pipeline, [memoryview(file) for file in files])
            pixels = tensor(run(pipeline, device)[0]).clone()
        except RuntimeError as error:
            pipeline, reason = None, dali_reason(error)
            yield _culprit(images, batch) or EvalError(f"{images.names[batch[0]]} and the {len(batch) - 1} after it: DALI: {reason}")
            continue
        yield pixels


def _culprit(images: FaceImages, batch: Batch) -> EvalError | None:
    """What Pillow says of the first image that it cannot decode."""
    for image in batch:
        try:
            images.decode(image)
        except EvalError as error:
            return error
    return None


def in_threads(work: Callable[[int], Any], batches: Iterable[Batch], threads: int, ahead: int = AHEAD) -> Iterator[list[Any] | EvalError]:
    """What ``work`` makes of each batch's images, or what it raised first; ``ahead`` batches in advance."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future]] = deque()
        try:
            for batch in batches:
                pending.append([pool.submit(work, image) for image in batch])
                if len(pending) > ahead:
                    yield _results(pending.popleft())
            while pending:
                yield _results(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _results(futures: list[Future]) -> list[Any] | EvalError:
    try:
        return [future.result() for future in futures]
    except EvalError as error:
        return error
