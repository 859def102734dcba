"""Reads batches by the set's table of records, in the order that data_pipeline.order gives. Bad records are replaced."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import pipeline_def

from data_pipeline.augment import Augment
from data_pipeline.errors import DataError
from data_pipeline.fetch import RecordFetcher
from data_pipeline.graph import (
    PREFETCH,
    Decode,
    Share,
    dali_reason,
    decoded,
    drawn_names,
    fed,
    feed_draws,
    feed_images,
    normalised,
    pixels,
    run,
)
from data_pipeline.record_table import AllBut
from data_pipeline.shard_set import ShardSet

_READ_AHEAD = 8  # as many batches, and up to twice as many, are planned ahead of those fed; the system reads their records meanwhile
_SUBSTITUTES = 16  # images tried in place of a bad one


class TableBackend:
    """The batches of one rank from the one after ``step`` batches on."""

    def __init__(
        self,
        faces: ShardSet,
        kept: AllBut,
        share: Share,
        augment: Augment,
        decode: Decode,
        device: torch.device,
        num_threads: int,
        *,
        step: int,
        bad_records: dict[int, str],
        max_bad_records: int,
        say: Callable[[str], None],
    ) -> None:
        """``bad_records``: record number -> what is wrong, of those known already; more are added as they are met.

        Raises DataError: more of them than ``max_bad_records``, a shard that cannot be opened.
        """
        self._faces, self._kept, self._share, self._augment, self._device = faces, kept, share, augment, device
        self._bad_records, self._max_bad_records, self._say = bad_records, max_bad_records, say
        self._fetcher = RecordFetcher(faces)
        self.bytes_read = 0
        options = {"batch_size": share.batch_size, "num_threads": num_threads, "device_id": device.index, "prefetch_queue_depth": PREFETCH}
        self._build = partial(_table_pipeline, augment, decode, **options)
        self._failure: DataError | None = None  # raised by every call from then on
        if len(bad_records) > max_bad_records:
            raise self._too_many(list(bad_records.values())[-1])
        self._begin(step)

    def _begin(self, step: int) -> None:
        """Start a pipeline with the batch after ``step`` batches."""
        self._step = self._planned = step
        self._ahead: deque[tuple[int, np.ndarray, np.ndarray]] = deque()  # (epoch, positions, record numbers) of batches not fed yet
        self._queue: deque[np.ndarray] = deque()  # record numbers of the batches in the pipeline
        self._pipeline = self._build()
        self._pipeline.build()
        for _ in range(PREFETCH):
            self._feed()

    @property
    def batches_ahead(self) -> int:
        return len(self._queue) + len(self._ahead)

    def next(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], list[str]]]:
        """Images [b, 3, 112, 112] float32 on the device, the set's labels [b] int64 on the CPU, and a function that names the records."""
        if self._failure is not None:
            raise self._failure
        try:
            images, numbers = self._run()
        except DataError as error:
            self._failure = error
            raise
        try:
            self._feed()
        except DataError as error:  # of a batch to come: this one is sound
            self._failure = error
        labels = self._faces.labels[numbers].astype(np.int64)
        return normalised(images), torch.from_numpy(labels), partial(self._faces.names, numbers)

    def _run(self) -> tuple[Any, np.ndarray]:
        """A batch off the pipeline, and the numbers of its records."""
        while True:
            try:
                (images,) = run(self._pipeline, self._device)
            except RuntimeError as error:
                self._find_undecodable(self._queue[0], error)
                self._begin(self._step)
            else:
                self._step += 1
                return images, self._queue.popleft()

    def _feed(self) -> None:
        """Read the next batch into the pipeline."""
        step = self._step + len(self._queue)
        if len(self._ahead) <= _READ_AHEAD:
            self._plan()
        epoch, positions, numbers = self._ahead.popleft()
        images = self._fetcher.fetch(numbers)
        self.bytes_read += sum(map(len, (image for image in images if not isinstance(image, DataError))))
        for i, image in enumerate(images):
            number = int(numbers[i])
            if number not in self._bad_records and isinstance(image, DataError):
                self._note(number, str(image))
            if number in self._bad_records:
                numbers[i], images[i] = self._substitute(epoch, int(positions[i]), number)
        feed_images(self._pipeline, images)
        feed_draws(self._pipeline, self._augment, self._share, step)
        self._queue.append(numbers)

    def _plan(self) -> None:
        """Plan as many batches as remain of the epoch, up to _READ_AHEAD: the order is computed for all of them at once."""
        left = self._share.batches_per_epoch - self._planned % self._share.batches_per_epoch
        steps = range(self._planned, self._planned + min(_READ_AHEAD, left))
        epochs, positions = zip(*map(self._share.positions, steps), strict=True)
        numbers = self._kept[self._share.order.images(epochs[0], np.concatenate(positions))].reshape(len(steps), -1)
        for batch in numbers:
            self._fetcher.will_need(batch)
        self._ahead.extend(zip(epochs, positions, numbers, strict=True))
        self._planned = steps.stop

    def _substitute(self, epoch: int, position: int, bad: int) -> tuple[int, memoryview]:
        """The number of another record, and its image."""
        candidates = self._kept[self._share.order.substitutes(epoch, position, _SUBSTITUTES)].tolist()
        for number in candidates:
            if number not in self._bad_records:
                (image,) = self._fetcher.fetch(np.array([number]))
                if not isinstance(image, DataError):
                    return number, image
                self._note(number, str(image))
        raise DataError(
            f"{self._bad_records[bad]}; and all of {len(set(candidates))} records that might stand in for it are bad as well{self._remedy}"
        )

    def _note(self, number: int, problem: str) -> None:
        """Count a bad record. Raises DataError above the limit."""
        self._bad_records[number] = problem
        if len(self._bad_records) > self._max_bad_records:
            raise self._too_many(problem)
        self._say(f"rank {self._share.rank}: {problem}; another image takes its place")

    def _too_many(self, problem: str) -> DataError:
        return DataError(
            f"rank {self._share.rank}: {problem}; that is bad record number {len(self._bad_records)} of this rank, and "
            f"data.max_bad_records allows {self._max_bad_records}{self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        return (
            ": copy the damaged shards again, or raise data.max_bad_records, and resume from the last checkpoint; or let `python -m "
            f"data_pipeline verify {self._faces.path}` put bad records in quarantine and start a new run without them"
        )

    def _find_undecodable(self, numbers: np.ndarray, error: RuntimeError) -> None:
        """Note the records of a batch whose images DALI cannot decode on the CPU either.

        Raises DataError when there is none, or no other: then something else is wrong, such as the memory of a GPU.
        """
        problems, trial = {}, None
        for number, image in zip(numbers.tolist(), self._fetcher.fetch(numbers), strict=True):
            if isinstance(image, DataError):  # since it was fed
                problems[number] = str(image)
                continue
            if trial is None:
                trial = _trial_pipeline()
                trial.build()
            feed_images(trial, [image])
            try:
                trial.run()
            except RuntimeError as reason:
                problems[number] = f"{self._faces.where(number)}: cannot be decoded ({dali_reason(reason)})"
                trial = None  # what a failure leaves of a pipeline is not to be relied on
        if not problems or len(problems) == len(numbers) > 1:
            raise DataError(f"{self._faces.path}: rank {self._share.rank}, step {self._step + 1}: DALI failed: {error}") from error
        for number, problem in problems.items():
            self._note(number, problem)


@pipeline_def(enable_conditionals=True)
def _table_pipeline(augment: Augment, decode: Decode) -> Any:
    inputs = fed(["encoded", *drawn_names(augment)])
    return pixels(inputs["encoded"], inputs, augment, decode)


@pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
def _trial_pipeline() -> Any:
    return decoded(fed(["encoded"])["encoded"], Decode("cpu"))
