"""From encoded images to what a network takes: the DALI graph, one for CPU and GPU, what is fed into it, and what becomes of its output."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from data_pipeline import SIDE
from data_pipeline.augment import NUM_DRAWS, Augment
from data_pipeline.errors import DataError
from data_pipeline.order import EpochOrder, uniforms

PREFETCH = 2  # batches that DALI works on at a time
_IN_CACHE = 8  # images that a CPU normalises at a time: 1.2 MB


@dataclass(frozen=True)
class Decode:
    """Where JPEGs are decoded when the images go to a GPU. Without one the CPU decodes."""

    device: Literal["mixed", "cpu"] = "mixed"  # mixed: the GPU, all but the Huffman codes where it has no JPEG unit
    hw_load: float = 0.9  # share of a batch for the GPU's JPEG unit, where it has one; mixed alone

    def __post_init__(self) -> None:
        if not 0 <= self.hw_load <= 1:
            raise DataError(f"decode.hw_load: must lie in [0, 1], got {self.hw_load}")


@dataclass(frozen=True)
class Share:
    """Which images a rank reads and what is drawn for them."""

    order: EpochOrder
    batch_size: int
    rank: int
    world_size: int

    @property
    def batches_per_epoch(self) -> int:
        return self.order.images_per_epoch // (self.batch_size * self.world_size)

    def positions(self, step: int) -> tuple[int, Any]:
        """(epoch, [b] int64 positions in its order) of the batch after ``step`` batches."""
        return self.order.positions(step * self.batch_size * self.world_size, self.batch_size, self.rank, self.world_size)


def fed(names: Iterable[str]) -> dict[str, Any]:
    """The inputs of a graph, to be fed by ``pipeline.feed_input`` under these names."""
    return {name: fn.external_source(name=name) for name in names}


def drawn_names(augment: Augment) -> list[str]:
    """What ``feed_draws`` feeds."""
    return list(augment.draw(uniforms(0, 0, range(1), NUM_DRAWS)))


def feed_images(pipeline: dali.Pipeline, images: Sequence[memoryview]) -> None:
    """Feed encoded images under the name "encoded". DALI copies them."""
    pipeline.feed_input("encoded", TensorListCPU([TensorCPU(image) for image in images], contiguous=False))  # faster than a list of arrays


def feed_draws(pipeline: dali.Pipeline, augment: Augment, share: Share, step: int) -> None:
    """Feed what is drawn for the images of the batch after ``step`` batches."""
    epoch, positions = share.positions(step)
    for name, values in augment.draw(uniforms(share.order.seed, epoch, positions, NUM_DRAWS)).items():
        pipeline.feed_input(name, values)


def pixels(encoded: Any, drawn: dict[str, Any], augment: Augment, decode: Decode) -> Any:
    """The graph: encoded images [bytes] uint8 on the CPU -> [112, 112, 3] uint8 on the pipeline's device, for ``normalised``."""
    return augment.apply(decoded(encoded, decode), drawn)


def decoded(encoded: Any, decode: Decode) -> Any:
    """Encoded images [bytes] uint8 on the CPU -> [112, 112, 3] uint8 on the pipeline's device.

    Pixels are as stored (an EXIF rotation tag is no part of an aligned face), and upsampled on a GPU as on a CPU.
    """
    on_gpu = dali.Pipeline.current().device_id is not None
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if on_gpu and decode.device == "mixed":
        hints = {"hw_decoder_load": decode.hw_load, "preallocate_width_hint": SIDE, "preallocate_height_hint": SIDE}
        return fn.decoders.image(encoded, device="mixed", jpeg_fancy_upsampling=True, **hints, **options)
    image = fn.decoders.image(encoded, device="cpu", **options)
    return image.gpu() if on_gpu else image


def run(pipeline: dali.Pipeline, device: torch.device) -> tuple[Any, ...]:
    """One batch off the pipeline.

    The outputs are DALI's own memory, which it uses again once they are dropped. On a GPU they are bound to torch's current stream: torch
    waits for the decoder there, and the memory is used again after what torch has queued by then.
    """
    return pipeline.run(None if device.type == "cpu" else torch.cuda.current_stream(device))


def tensor(outputs: Any) -> torch.Tensor:
    """A DALI output of equal shapes as one tensor, without a copy."""
    return torch.from_dlpack(outputs.as_tensor())


def normalised(outputs: Any) -> torch.Tensor:
    """DALI's images [b, 112, 112, 3] uint8 -> [b, 3, 112, 112] float32 in [-1, 1], channels last in memory, as they come.

    fn.crop_mirror_normalize would do it in the time of the decoding threads, which is what a batch waits for on a CPU.
    """
    levels = tensor(outputs)
    images = torch.empty(levels.shape, dtype=torch.float32, device=levels.device)
    at_once = len(levels) if levels.is_cuda else _IN_CACHE
    for part, out in zip(levels.split(at_once), images.split(at_once), strict=True):
        out.copy_(part).sub_(127.5).div_(127.5)
    return images.permute(0, 3, 1, 2)


def dali_reason(error: RuntimeError) -> str:
    """The telling line of one of DALI's errors."""
    return str(error).partition("encountered:")[2].strip().partition("\n")[0] or str(error)
