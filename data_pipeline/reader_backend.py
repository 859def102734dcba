"""Reads batches through DALI's record reader: sequential reads, shuffled within a buffer."""

import base64
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from data_pipeline import SIDE
from data_pipeline.augment import Augment
from data_pipeline.errors import DataError
from data_pipeline.graph import PREFETCH, Decode, Share, dali_reason, drawn_names, fed, feed_draws, normalised, pixels, run, tensor
from data_pipeline.shard_set import ShardSet

SHUFFLE_BUFFER = 4096  # records that each rank shuffles among; packed sets are shuffled globally before


class ReaderBackend:
    """The batches of one rank from the one after ``step`` batches on."""

    bytes_read = 0  # that we know of
    batches_ahead = PREFETCH

    def __init__(
        self,
        faces: ShardSet,
        excluded: np.ndarray,
        share: Share,
        augment: Augment,
        decode: Decode,
        device: torch.device,
        num_threads: int,
        *,
        step: int,
        checkpoint: str | None,
    ) -> None:
        """``checkpoint``: of ``state`` after ``step`` batches; None starts the run."""
        self._faces, self._share, self._augment, self._device, self._step = faces, share, augment, device, step
        # DALI pads every rank's share to whole batches of the largest share. What it reads beyond our epoch is dropped here: its own
        # iterator lets such a batch of repeated images into the next epoch where only some shares need it (2.4).
        largest = -(-share.order.num_images // share.world_size)
        self._leftover_batches = -(-largest // share.batch_size) - share.batches_per_epoch
        options = {
            "batch_size": share.batch_size,
            "num_threads": num_threads,
            "device_id": device.index,
            "prefetch_queue_depth": PREFETCH,
            "seed": _rank_seed(share.order.seed, share.rank),
        }
        if checkpoint is not None:
            options["checkpoint"] = base64.b64decode(checkpoint)
        with tempfile.TemporaryDirectory(prefix="face_index_") as folder:  # DALI has read the index once the pipeline is built
            index = Path(folder) / "kept.idx"
            keep = np.ones(faces.num_images, bool)
            keep[excluded] = False
            shards = [str(shard) for shard in faces.write_reader_index(index, keep)]
            self._pipeline = _reader_pipeline(shards, str(index), share, min(SHUFFLE_BUFFER, largest), augment, decode, **options)
            self._pipeline.build()
        # Runs of the pipeline that are fed: those of the batches returned, and of the leftovers before them.
        self._fed = step + self._leftover_batches * (max(step - 1, 0) // share.batches_per_epoch)
        for _ in range(PREFETCH):
            self._feed()

    def _feed(self) -> None:
        """Feed what is drawn for the next run of the pipeline; of leftovers, which nobody sees, anything."""
        epoch, run_of_epoch = divmod(self._fed, self._share.batches_per_epoch + self._leftover_batches)
        feed_draws(self._pipeline, self._augment, self._share, epoch * self._share.batches_per_epoch + run_of_epoch)
        self._fed += 1

    def next(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], list[str]]]:
        """Images [b, 3, 112, 112] float32 on the device, the set's labels [b] int64 on the CPU, and a function that names the records."""
        if self._step and self._step % self._share.batches_per_epoch == 0:
            for _ in range(self._leftover_batches):
                self._run()
        images, labels, records = self._run()
        whole = labels.to(torch.int64)
        sound = (labels >= 0) & (labels < self._faces.num_classes) & (whole == labels)
        if not bool(sound.all()):
            raise DataError(
                f"{self._where()}: {_first(records, ~sound)}: label {labels[~sound][0].item():g}, expected a whole number in "
                f"[0, {self._faces.num_classes}): `python -m data_pipeline verify {self._faces.path}` finds all such records"
            )
        self._step += 1
        return images, whole, records

    def checkpoint(self) -> str:
        """DALI's state after the last batch, as text."""
        return base64.b64encode(self._pipeline.checkpoint()).decode("ascii")

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], list[str]]]:
        """One batch off the pipeline: as ``next``, labels [b] float32 as stored."""
        try:
            images, labels, shapes = run(self._pipeline, self._device)
        except RuntimeError as error:
            raise DataError(
                f"{self._where()}, or one of the next few, which are read ahead: DALI cannot read a record ({dali_reason(error)}). "
                f"`python -m data_pipeline verify {self._faces.path}` names it: copy its shard again and resume from the last checkpoint, "
                "or start a new run, which leaves out what verify puts in quarantine"
            ) from error
        self._feed()
        records = partial(_record_names, self._faces, shapes)
        sizes = tensor(shapes)
        wrong = (sizes[:, :2] != SIDE).any(dim=1)
        if bool(wrong.any()):
            height, width = sizes[wrong][0, :2].tolist()
            raise DataError(
                f"{self._where()}: {_first(records, wrong)}: an image of {width}x{height} pixels, expected {SIDE}x{SIDE}; crop the faces "
                "first"
            )
        return normalised(images), tensor(labels).reshape(-1), records

    def _where(self) -> str:
        return f"{self._faces.path}: rank {self._share.rank}, step {self._step + 1}"


def _record_names(faces: ShardSet, samples: Any) -> list[str]:
    """Of a DALI TensorList made of the reader's images; it knows where they came from (the reader's labels do not)."""
    parts = [samples[i].source_info().rpartition(" at index ") for i in range(len(samples))]
    return faces.names(faces.numbers([shard for shard, _, _ in parts], [int(offset) for _, _, offset in parts]).tolist())


def _first(records: Callable[[], list[str]], chosen: torch.Tensor) -> str:
    """The name of the first record where ``chosen`` ([b] bool) is set."""
    return records()[int(chosen.nonzero()[0])]


@pipeline_def(enable_conditionals=True, enable_checkpointing=True)
def _reader_pipeline(shards: list[str], index: str, share: Share, buffer: int, augment: Augment, decode: Decode) -> Any:
    """Images [112, 112, 3] uint8, labels [1] float32, sizes [3] int64 (height, width, channels).

    Which file follows which after an epoch is drawn from a seed that all ranks share; the shuffle within the buffer comes from the
    pipeline's own. ``pad_last_batch`` makes all ranks' epochs equally long: see ``_leftover_batches``.
    """
    file_order = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": share.order.seed} if len(shards) > 1 else {}
    encoded, label = fn.readers.mxnet(
        path=shards,
        index_path=[index],
        shard_id=share.rank,
        num_shards=share.world_size,
        random_shuffle=True,
        initial_fill=buffer,
        pad_last_batch=True,
        prefetch_queue_depth=2,
        tensor_init_bytes=1 << 14,
        **file_order,
    )
    size = fn.peek_image_shape(encoded, adjust_orientation=False)
    # The decoder waits for the peek: an image that DALI 2.4 cannot parse is an error there, but can crash the process in the decoder.
    encoded = fn.reshape(encoded, shape=encoded.shape() + size[2:3] * 0)
    label = fn.slice(label, 0, 1, axes=[0])  # a record with several labels: the first is its class
    return pixels(encoded, fed(drawn_names(augment)), augment, decode), label, size


def _rank_seed(seed: int, rank: int) -> int:
    """A seed of its own for every rank; ranks of neighbouring seeds share none."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0] >> 1)  # DALI takes 31 bits everywhere
