"""DALI batches of faces for one rank: shuffled, augmented, endless, and resumable to the bit."""

import base64
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, pipeline_def, types

from data_pipeline import SIDE
from data_pipeline.errors import DataError
from data_pipeline.shard_set import RecordNames, open_set

_SHUFFLE_BUFFER = 4096  # records that each rank shuffles among; packed sets are shuffled globally before
_GREY = 127  # what a shifted image uncovers; 0 after normalisation


@dataclass(frozen=True)
class Augment:
    """Random changes, drawn per image."""

    flip: float = 0.5  # probability of a left-right mirror image
    shift_px: int = 0  # translation, uniform in [-shift_px, shift_px] on each axis; what it uncovers is grey (127)
    brightness: float = 0.0  # factor on the pixel values, uniform in [1 - brightness, 1 + brightness], clipped to 0..255

    def __post_init__(self) -> None:
        for name, low, high in (("flip", 0, 1), ("shift_px", 0, SIDE // 2), ("brightness", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise DataError(f"augment.{name}: must lie in [{low}, {high}], got {getattr(self, name)}")


def batches_per_epoch(num_images: int, world_size: int, batch_size: int) -> int:
    """Full batches that every rank reads in an epoch."""
    return (num_images // world_size) // batch_size


@dataclass(frozen=True)
class Batch:
    """What one rank trains on at one step. The tensors are the caller's to keep and change."""

    images: torch.Tensor  # [b, 3, 112, 112] float32 in [-1, 1], RGB, on the loader's device
    labels: torch.Tensor  # [b] int64 in [0, num_classes), on the loader's device
    epoch: int  # 0 in the first
    step: int  # batches read since the start of the run, this one included
    records: Callable[[], list[str]]  # [b] names of the images' records, made when called; holds no image. See FaceLoader


class FaceLoader:
    """Endless iterator of ``Batch`` for one rank: ``next(loader)``, epoch after epoch.

    In an epoch no image is read twice, on any rank, and every rank reads ``steps_per_epoch = (num_images // world_size) //
    batch_size`` full batches; the few images left over differ from epoch to epoch. Order: the records as stored, shuffled within a
    buffer of 4,096 per rank; with several shards, which shard follows which changes every epoch, the same way on all ranks.

    ``batch.records()`` names the records of a batch, as long as one likes after it was read: "shard_00006.rec offset 5762928 (key
    5123)". DALI carries file and offset along with the b image sizes; those are kept, and asked when somebody calls (13 us a record; the
    set's index is read at the first call, see ``shard_set.RecordNames``).

    Args:
        path: a packed set, or a field set (``shard_set.open_set``).
        batch_size: b, images per batch on this rank.
        device_id: None decodes on the CPU into CPU tensors; a number decodes on that GPU.
        seed: the same on all ranks; augmentation and buffer shuffling differ per rank all the same.
        num_threads: DALI's decoding threads. Changes no value.
        min_images_per_identity: leave out identities with fewer images, and number the others densely, in the order of their labels.
        expected_images, expected_classes: what ``num_images`` and ``num_classes`` must be; None: anything.
        state: what ``state()`` returned in a run of the same set and arguments; continues with the batch that would have come next.

    Attributes: ``num_classes`` (C, after that numbering), ``num_images``, ``batch_size``, ``steps_per_epoch``, ``fingerprint``.
    Raises DataError: no such set; not as many images or classes as expected; fewer images than one batch per rank; a ``state`` of
    something else; while reading: a label out of range, or a record that DALI cannot read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device_id: int | None = None,
        seed: int = 0,
        num_threads: int = 2,
        augment: Augment = Augment(),
        min_images_per_identity: int = 1,
        expected_images: int | None = None,
        expected_classes: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        _check_arguments(batch_size, rank, world_size, device_id, seed, num_threads, min_images_per_identity)
        faces = open_set(path)
        keep = faces.images_per_class >= min_images_per_identity if min_images_per_identity > 1 else np.ones(faces.num_classes, bool)
        self.path = faces.path
        self.num_classes = int(keep.sum())
        self.num_images = int(faces.images_per_class[keep].sum())
        self.batch_size = batch_size
        self.steps_per_epoch = batches_per_epoch(self.num_images, world_size, batch_size)
        self._rank = rank
        self._device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
        self._new_label = torch.from_numpy(np.where(keep, np.cumsum(keep) - 1, -1))  # [C of the set] int64, -1: left out
        self._names = RecordNames(faces)
        kept = f" with min_images_per_identity={min_images_per_identity}" if min_images_per_identity > 1 else ""
        for name, expected in (("num_images", expected_images), ("num_classes", expected_classes)):
            found = getattr(self, name)
            if expected not in (None, found):
                raise DataError(f"data.{name}: {expected} expected, but {path}{kept} has {found}: mend data.path or data.{name}")
        if not self.steps_per_epoch:
            raise DataError(
                f"{path}: num_images={self.num_images}{kept} is less than world_size={world_size} x batch_size={batch_size}, one batch per "
                "rank: use a smaller batch_size, fewer ranks, or more images"
            )
        self.fingerprint = {
            "set": faces.digest,
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "batch_size": batch_size,
            "rank": rank,
            "world_size": world_size,
            "device": "cpu" if device_id is None else "gpu",
            "seed": seed,
            "min_images_per_identity": min_images_per_identity,
            "shuffle_buffer": _SHUFFLE_BUFFER,
            "dali": dali.__version__,
            **{f"augment.{name}": value for name, value in asdict(augment).items()},
        }
        if state is not None:
            _check_state(state, self.fingerprint)
        self.step = 0 if state is None else state["step"]
        # DALI pads every rank's share to whole batches of the largest share. What it reads beyond steps_per_epoch is dropped here:
        # its own iterator lets such a batch of repeated images into the next epoch where only some shares need it (2.4).
        share = -(-self.num_images // world_size)
        self._leftover_batches = -(-share // batch_size) - self.steps_per_epoch
        options = {"batch_size": batch_size, "num_threads": num_threads, "device_id": device_id, "seed": _rank_seed(seed, rank)}
        if state is not None:
            options["checkpoint"] = base64.b64decode(state["dali"])
        with tempfile.TemporaryDirectory(prefix="face_index_") as folder:  # DALI has read the index once the pipeline is built
            index, shards = faces.index, faces.shards
            if faces.layout == "field" or not keep.all():
                index = Path(folder) / "kept.idx"
                shards = faces.write_reader_index(index, keep[faces.labels])
            self._pipeline = _face_pipeline(
                [str(shard) for shard in shards], str(index), rank, world_size, seed, min(_SHUFFLE_BUFFER, share), augment, **options
            )
            self._pipeline.build()

    def __iter__(self) -> "FaceLoader":
        return self

    def __next__(self) -> Batch:
        if self.step and self.step % self.steps_per_epoch == 0:
            for _ in range(self._leftover_batches):
                self._run()
        images, stored, records = self._run()
        labels = self._renumbered(stored, records).to(self._device)
        self.step += 1
        return Batch(images, labels, (self.step - 1) // self.steps_per_epoch, self.step, records)

    def state(self) -> dict[str, Any]:
        """Where the run stands after the last batch that ``next`` returned. JSON-able: ``dali`` str, ``fingerprint`` dict, ``step`` int."""
        dali_state = base64.b64encode(self._pipeline.checkpoint()).decode("ascii")
        return {"dali": dali_state, "fingerprint": dict(self.fingerprint), "step": self.step}

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], list[str]]]:
        """One batch off the pipeline: images [b, 3, 112, 112] float32 on the device, labels [b] float32 as stored, on the CPU, and names.

        The tensors are DALI's own memory, which DALI gives up with them. On a GPU they are bound to torch's current stream: torch
        waits for the decoder there, and the memory is used again after what torch has queued by the time it drops them.
        """
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
        try:
            images, labels, shapes = self._pipeline.run(stream)
            records = partial(_record_names, self._names, shapes)
            sizes = torch.from_dlpack(shapes.as_tensor())
            wrong = (sizes[:, :2] != SIDE).any(dim=1)
            if bool(wrong.any()):
                height, width = sizes[wrong][0, :2].tolist()
                raise DataError(
                    f"{self._where()}: {_first(records, wrong)}: an image of {width}x{height} pixels, expected {SIDE}x{SIDE}; crop the "
                    "faces first"
                )
            return torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor()).reshape(-1), records
        except RuntimeError as error:
            reason = str(error).partition("encountered:")[2].strip().partition("\n")[0] or str(error)
            raise DataError(
                f"{self._where()}, or one of the next few, which are read ahead: DALI cannot read a record ({reason}). "
                f"`python -m data_pipeline verify {self.path}` names it; repair the set, then resume from the last checkpoint"
            ) from error

    def _renumbered(self, labels: torch.Tensor, records: Callable[[], list[str]]) -> torch.Tensor:
        """[b] float32 as stored -> [b] int64 in [0, num_classes)."""
        whole = labels.to(torch.int64)
        sound = (labels >= 0) & (labels < len(self._new_label)) & (whole == labels)
        if not bool(sound.all()):
            raise DataError(
                f"{self._where()}: {_first(records, ~sound)}: label {labels[~sound][0].item():g}, expected a whole number in "
                f"[0, {len(self._new_label)}): `python -m data_pipeline verify {self.path}` finds all such records"
            )
        return self._new_label[whole]

    def _where(self) -> str:
        return f"{self.path}: rank {self._rank}, step {self.step + 1}"


def _record_names(names: RecordNames, samples: Any) -> list[str]:
    """Of a DALI TensorList made of the reader's images; it knows where they came from (the reader's labels do not)."""
    return names([samples[i].source_info() for i in range(len(samples))])


def _first(records: Callable[[], list[str]], chosen: torch.Tensor) -> str:
    """The name of the first record where ``chosen`` ([b] bool) is set."""
    return records()[int(chosen.nonzero()[0])]


@pipeline_def(enable_checkpointing=True)
def _face_pipeline(shards: list[str], index: str, rank: int, world_size: int, order_seed: int, buffer: int, augment: Augment) -> Any:
    """Images [112, 112] -> [3, 112, 112] float32 in [-1, 1], labels [1] float32, sizes [3] int64 (height, width, channels).

    One graph for CPU and GPU. Which file follows which after an epoch is drawn from ``order_seed``, which all ranks must share; the
    other draws come from the pipeline's own seed. ``pad_last_batch`` makes all ranks' epochs equally long: ``_leftover_batches``.
    """
    file_order = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": order_seed} if len(shards) > 1 else {}
    jpeg, label = fn.readers.mxnet(
        path=shards,
        index_path=[index],
        shard_id=rank,
        num_shards=world_size,
        random_shuffle=True,
        initial_fill=buffer,
        pad_last_batch=True,
        prefetch_queue_depth=2,
        tensor_init_bytes=1 << 14,
        **file_order,
    )
    size = fn.peek_image_shape(jpeg, adjust_orientation=False)
    # the pixels as stored (an EXIF rotation tag is no part of an aligned face), upsampled on a GPU as on a CPU
    on_gpu = dali.Pipeline.current().device_id is not None
    gpu = {"jpeg_fancy_upsampling": True, "preallocate_width_hint": SIDE, "preallocate_height_hint": SIDE} if on_gpu else {}
    image = fn.decoders.image(jpeg, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False, **gpu)
    if augment.brightness:
        image = fn.brightness(image, brightness=fn.random.uniform(range=(1 - augment.brightness, 1 + augment.brightness)))
    if augment.shift_px:
        steps = list(range(-augment.shift_px, augment.shift_px + 1))
        start = fn.random.uniform(values=steps, shape=[2], dtype=types.INT32)
        image = fn.slice(image, start=start, shape=[SIDE, SIDE], axes=(0, 1), out_of_bounds_policy="pad", fill_values=_GREY)
    mirror = fn.random.coin_flip(probability=augment.flip)
    image = fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="CHW", mean=[127.5] * 3, std=[127.5] * 3, mirror=mirror)
    return image, fn.slice(label, 0, 1, axes=[0]), size  # a record with several labels: the first is its class


def _rank_seed(seed: int, rank: int) -> int:
    """A seed of its own for every rank; ranks of neighbouring seeds share none."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0] >> 1)  # DALI takes 31 bits everywhere


def _check_arguments(
    batch_size: int, rank: int, world_size: int, device_id: int | None, seed: int, num_threads: int, min_images_per_identity: int
) -> None:
    for name, value, low in (
        ("batch_size", batch_size, 1),
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
    if device_id is not None and not 0 <= device_id < torch.cuda.device_count():
        raise DataError(f"device_id: {device_id}, but torch sees {torch.cuda.device_count()} GPUs; None decodes on the CPU")


def _check_state(state: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """DALI takes the state of another set or batch size without a word, and then reads other data."""
    if not isinstance(state, dict) or not {"dali", "fingerprint", "step"} <= state.keys():
        raise DataError("state: expected what FaceLoader.state() returns, a dict with the keys dali, fingerprint, step")
    theirs = state["fingerprint"]
    differing = [key for key in fingerprint | theirs if fingerprint.get(key) != theirs.get(key)]
    if differing:
        pairs = "; ".join(f"{key}: {theirs.get(key)!r} in the state, {fingerprint.get(key)!r} here" for key in differing)
        raise DataError(f"state: of another run, so exact resume is impossible ({pairs}). Use the same values, or start without a state")
