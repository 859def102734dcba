"""DALI batches of faces for one rank: shuffled, augmented, endless, and resumable to the bit."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import nvidia.dali as dali
import torch

from data_pipeline.augment import Augment
from data_pipeline.errors import DataError
from data_pipeline.graph import Decode, Share
from data_pipeline.order import EpochOrder
from data_pipeline.reader_backend import SHUFFLE_BUFFER, ReaderBackend
from data_pipeline.record_table import AllBut
from data_pipeline.shard_set import ShardSet, open_set
from data_pipeline.table_backend import TableBackend


@dataclass(frozen=True)
class Batch:
    """What one rank trains on at one step. The tensors are the caller's to keep and change."""

    images: torch.Tensor  # [b, 3, 112, 112] float32 in [-1, 1], RGB, channels last in memory, on the loader's device
    labels: torch.Tensor  # [b] int64 in [0, num_classes), on the loader's device
    epoch: int  # 0 in the first
    step: int  # batches of this size read since the start of the run, this one included
    records: Callable[[], list[str]]  # [b] names of the images' records, made when called; holds no image. See FaceLoader


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class FaceLoader:
    """Endless iterator of ``Batch`` for one rank: ``next(loader)``, epoch after epoch.

    An epoch is as many whole global batches as there are images for; the images left over, fewer than a global batch, are others in every
    epoch. No image is read twice in an epoch, on any rank, as long as no two records are damaged.

    backend "table": every epoch is a new permutation of all images, a pure function of (set, seed, epoch, global batch size): the same
    global batches, augmented in the same way, on any number of ranks (``order``). Records are read by their place in the set's table
    and compared with it. One that is damaged is named, counted, and replaced in its batch by an image that the epoch leaves out, if there
    is a sound one (``EpochOrder.substitutes``). What grows with the set is shared by the processes of a node; a rank has 8 bytes for each
    record that it leaves out.

    backend "reader": DALI's record reader. Each rank has its share of the files, read in their order through a shuffle buffer of 4,096;
    with several shards, which file follows which changes every epoch. Reads are sequential, which rotating disks need. The order depends
    on the number of ranks and the batch size; a damaged record stops the run. Each rank has an index of its own, in memory and, while it
    starts, on the disk.

    ``batch.records()`` names the records of a batch, as long as one likes after it was read: "shard_00006.rec offset 5762928 (key 5123)".

    Args:
        path: a packed set, or a field set (``shard_set.open_set``).
        batch_size: b, images per batch on this rank.
        global_batch_size: images per optimizer step, over all ranks and micro-batches, a multiple of batch_size x world_size; None:
            just that.
        device_id: None puts the images into CPU tensors; a number on that GPU, ``decode`` says how.
        seed: the same on all ranks.
        num_threads: DALI's decoding threads. Changes no value.
        min_images_per_identity: leave out identities with fewer images, and number the others densely, in the order of their labels.
        expected_images, expected_classes: what ``num_images`` and ``num_classes`` must be; None: anything.
        max_bad_records: more damaged records on this rank stop the run (table).
        bad_records: those known already, as ``bad_records`` of another loader of the set has them.
        say: told of every damaged record; the default prints to stderr.
        state: what ``state()`` returned in a run of the same set and arguments; continues with the batch that would have come next. Under
            "table" rank, world_size and batch_size may be others: the epoch goes on without an image lost or repeated.

    Attributes: ``num_classes`` (C, after that numbering), ``num_images``, ``batch_size``, ``global_batch_size``, ``batches_per_epoch``
        (batches), ``fingerprint``, ``bad_records`` (record number -> what is wrong with it, of those this rank met), ``bytes_read`` (of
        records, by this loader; 0 under "reader", where DALI reads), ``batches_ahead`` (that are being read or decoded already).
    Raises DataError: no such set; not as many images or classes as expected; fewer images than one batch per rank; a ``state`` of
    something else; while reading: too many damaged records (table), or any (reader).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        global_batch_size: int | None = None,
        backend: Literal["table", "reader"] = "table",
        device_id: int | None = None,
        decode: Decode = Decode(),
        seed: int = 0,
        num_threads: int = 2,
        augment: Augment = Augment(),
        min_images_per_identity: int = 1,
        expected_images: int | None = None,
        expected_classes: int | None = None,
        max_bad_records: int = 100,
        bad_records: Mapping[int, str] | None = None,
        say: Callable[[str], None] = _say,
        state: dict[str, Any] | None = None,
    ) -> None:
        global_batch_size = batch_size * world_size if global_batch_size is None else global_batch_size
        _check_arguments(batch_size, global_batch_size, rank, world_size, device_id, seed, num_threads, min_images_per_identity)
        faces = open_set(path)
        self.path, self.batch_size, self.global_batch_size = faces.path, batch_size, global_batch_size
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        excluded, self._new_label, self.num_classes = select_records(faces, min_images_per_identity)
        self.num_images = faces.num_images - len(excluded)
        kept = f" with min_images_per_identity={min_images_per_identity}" if min_images_per_identity > 1 else ""
        for name, expected in (("num_images", expected_images), ("num_classes", expected_classes)):
            found = getattr(self, name)
            if expected not in (None, found):
                raise DataError(f"data.{name}: {expected} expected, but {path}{kept} has {found}: mend data.path or data.{name}")
        if self.num_images < global_batch_size:
            raise DataError(
                f"{path}: num_images={self.num_images}{kept} is less than one global batch of {global_batch_size} "
                f"(world_size={world_size}, batch_size={batch_size}): use a smaller batch_size, fewer ranks, or more images"
            )
        share = Share(EpochOrder(self.num_images, global_batch_size, seed), batch_size, rank, world_size)
        self.batches_per_epoch = share.batches_per_epoch
        self._images_per_batch = batch_size * world_size  # over all ranks
        self.fingerprint = {
            "set": faces.digest,
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "global_batch_size": global_batch_size,
            "device": "cpu" if device_id is None else f"gpu, decoded by {decode.device}, hw_load {decode.hw_load}",
            "seed": seed,
            "min_images_per_identity": min_images_per_identity,
            "backend": backend,
            "dali": dali.__version__,
            **{f"augment.{name}": value for name, value in asdict(augment).items()},
        }
        if backend == "reader":
            self.fingerprint |= {"batch_size": batch_size, "rank": rank, "world_size": world_size, "shuffle_buffer": SHUFFLE_BUFFER}
        if state is not None:
            _check_state(state, self.fingerprint, self._images_per_batch)
        self.step = 0 if state is None else state["images"] // self._images_per_batch
        known = {} if state is None else state["bad_records"]
        self.bad_records = {**(bad_records or {}), **{int(number): problem for number, problem in known.items()}}
        common = (share, augment, decode, self._device, num_threads)
        if backend == "table":
            self._backend = TableBackend(
                faces, AllBut(excluded), *common, step=self.step, bad_records=self.bad_records, max_bad_records=max_bad_records, say=say
            )
        else:
            self._backend = ReaderBackend(faces, excluded, *common, step=self.step, checkpoint=state and state["dali"])

    @property
    def bytes_read(self) -> int:
        return self._backend.bytes_read

    @property
    def batches_ahead(self) -> int:
        return self._backend.batches_ahead

    def __iter__(self) -> "FaceLoader":
        return self

    def __next__(self) -> Batch:
        images, labels, records = self._backend.next()
        if self._new_label is not None:
            labels = self._new_label[labels]
        self.step += 1
        return Batch(images, labels.to(self._device), (self.step - 1) // self.batches_per_epoch, self.step, records)

    def state(self) -> dict[str, Any]:
        """Where the run stands after the last batch returned. JSON-able; under "table" equal on all ranks but for bad records.

        ``images``: read so far over all ranks; ``fingerprint`` dict; ``bad_records`` dict; ``dali``: the reader's own state, else None.
        """
        return {
            "images": self.step * self._images_per_batch,
            "fingerprint": dict(self.fingerprint),
            "bad_records": {str(number): problem for number, problem in self.bad_records.items()},
            "dali": self._backend.checkpoint() if isinstance(self._backend, ReaderBackend) else None,
        }


def select_records(faces: ShardSet, min_images_per_identity: int) -> tuple[np.ndarray, torch.Tensor | None, int]:
    """Which records and classes a run has, without those in quarantine and identities of fewer images.

    Returns the numbers of the records to leave out (sorted [E] int64), the new labels ([C of the set] int64, -1: left out; None: as they
    are), and the number of classes.
    """
    if min_images_per_identity == 1:
        return faces.excluded, None, faces.num_classes
    keep = faces.images_per_class >= min_images_per_identity
    small = [start + np.flatnonzero(~keep[labels]) for start, labels in faces.label_blocks()]
    excluded = np.union1d(faces.excluded, np.concatenate(small)) if len(faces.excluded) else np.concatenate(small)
    return excluded, torch.from_numpy(np.where(keep, np.cumsum(keep) - 1, -1)), int(keep.sum())


def _check_arguments(
    batch_size: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    device_id: int | None,
    seed: int,
    num_threads: int,
    min_images_per_identity: int,
) -> None:
    for name, value, low in (
        ("batch_size", batch_size, 1),
        ("global_batch_size", global_batch_size, 1),
        ("world_size", world_size, 1),
        ("rank", rank, 0),
        ("seed", seed, 0),
        ("num_threads", num_threads, 1),
        ("min_images_per_identity", min_images_per_identity, 1),
    ):
        if value < low:
            raise DataError(f"{name}: must be at least {low}, got {value}")
    if rank >= world_size:
        raise DataError(f"rank: must be less than world_size={world_size}, got {rank}")
    if global_batch_size % (batch_size * world_size):
        raise DataError(f"global_batch_size: {global_batch_size} is no multiple of batch_size x world_size = {batch_size} x {world_size}")
    if device_id is not None and not 0 <= device_id < torch.cuda.device_count():
        raise DataError(f"device_id: {device_id}, but torch sees {torch.cuda.device_count()} GPUs; None decodes on the CPU")


def _check_state(state: dict[str, Any], fingerprint: dict[str, Any], images_per_batch: int) -> None:
    """Raises DataError unless ``state`` is of the same order of the same images, and stands between two batches."""
    if not isinstance(state, dict) or not {"images", "fingerprint", "bad_records", "dali"} <= state.keys():
        raise DataError("state: expected what FaceLoader.state() returns, a dict with the keys images, fingerprint, bad_records, dali")
    theirs = state["fingerprint"] if isinstance(state["fingerprint"], dict) else {}
    differing = [key for key in fingerprint | theirs if fingerprint.get(key) != theirs.get(key)]
    if differing:
        pairs = "; ".join(f"{key}: {theirs.get(key)!r} in the state, {fingerprint.get(key)!r} here" for key in differing)
        raise DataError(f"state: of another run, so exact resume is impossible ({pairs}). Use the same values, or start without a state")
    if state["images"] % images_per_batch:
        raise DataError(
            f"state: {state['images']} images were read, which is no multiple of batch_size x world_size = {images_per_batch}: it was "
            "taken inside an optimizer step; use the state of another step, or the old batch_size and world_size"
        )
