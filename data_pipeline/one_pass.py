"""Every image of a set once, as it is: not shuffled, not augmented."""

import os
from collections.abc import Iterator

import numpy as np
import torch

from data_pipeline.augment import Augment
from data_pipeline.graph import Decode, Share
from data_pipeline.loader import select_records
from data_pipeline.order import EpochOrder
from data_pipeline.record_table import AllBut
from data_pipeline.shard_set import open_set
from data_pipeline.table_backend import TableBackend


class _RecordOrder(EpochOrder):
    """The order of the records, in as many batches as hold all of them: beyond the last image the first ones come again."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch_size)

    def images(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions, np.int64) % self.num_images


class OnePass:
    """Iterates over batches ``(images [b, 3, 112, 112] float32 in [-1, 1], labels [b] int64 in [0, num_classes))`` of one rank.

    Over all ranks every image comes once; a label of -1 marks a row that is none: padding of the last batch, or in the place of a damaged
    record. Every rank has as many batches, ``len``, of as many rows. Records are read in their order, which any disk does fastest.

    Args: as of ``FaceLoader``, whose labels and classes these are.
    Attributes: ``num_images``, ``bad_records`` (record number -> what is wrong with it, of those this rank met).
    Raises DataError: no such set; while reading: more damaged records on this rank than ``max_bad_records``.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device_id: int | None = None,
        decode: Decode = Decode(),
        num_threads: int = 2,
        min_images_per_identity: int = 1,
        max_bad_records: int = 100,
    ) -> None:
        faces = open_set(path)
        excluded, self._new_label, _ = select_records(faces, min_images_per_identity)
        self._labels, self._kept = faces.labels, AllBut(excluded)
        self.num_images = faces.num_images - len(excluded)
        self.bad_records: dict[int, str] = {}
        self._share = Share(_RecordOrder(self.num_images, batch_size * world_size, seed=0), batch_size, rank, world_size)
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._backend = TableBackend(
            faces,
            self._kept,
            self._share,
            Augment(flip=0.0),
            decode,
            self._device,
            num_threads,
            step=0,
            bad_records=self.bad_records,
            max_bad_records=max_bad_records,
            say=lambda _: None,  # they are told when they are trained on
        )

    def __len__(self) -> int:
        return self._share.batches_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(len(self)):
            images, _, _ = self._backend.next()
            _, positions = self._share.positions(step)
            numbers = self._kept[positions % self.num_images]
            labels = torch.from_numpy(self._labels[numbers].astype(np.int64))
            if self._new_label is not None:
                labels = self._new_label[labels]
            bad = np.isin(numbers, list(self.bad_records))
            labels[torch.from_numpy((positions >= self.num_images) | bad)] = -1
            yield images, labels.to(self._device)
