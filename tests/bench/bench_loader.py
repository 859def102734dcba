"""What the loader costs, against DALI's bare decoding and against a torch DataLoader with Pillow, and which backend is faster here.

``python -m tests.bench.bench_loader --data SHARDS`` (without ``--data``: synthetic faces). All contenders read the same images of the same
files and take turns in one process. Equality first: every contender's images are those that Pillow decodes.

bare     fn.readers.mxnet and fn.decoders.image, nothing else: uint8 pixels that nobody can train on yet
table    FaceLoader, the default: true shuffle, checksums, mirror images, float32 [b, 3, 112, 112]
reader   FaceLoader over DALI's record reader, the same but for shuffle and checksums
pillow   torch's DataLoader over the same records, decoded by Pillow, mirrored and normalised by numpy: ``--threads`` worker processes

On a GPU the loader is run once for each way to decode (mixed with several shares for the JPEG unit, and on the CPU), and the fastest is
named as a recipe writes it.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_pipeline.augment import Augment
from data_pipeline.fetch import RecordFetcher
from data_pipeline.graph import Decode
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import pack
from data_pipeline.shard_set import ShardSet, open_set
from data_pipeline.synthetic import write_synthetic

TOLERANCE = 2.01 / 127.5  # two JPEG decoders may differ by a grey level or two
_SETTLE_S = 0.5  # after a turn, until its contender has read ahead and leaves the cores to the next


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a packed set")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--threads", type=int, default=1, help="decoding threads, and worker processes of the DataLoader")
    parser.add_argument(
        "--batches",
        type=int,
        default=40,
        help="of each contender in a turn: many, because each reads two ahead while the others have theirs",
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench_loader_") as folder:
        faces = open_set(arguments.data or _synthetic(Path(folder)))
        mean = sum(faces.shard_bytes) / faces.num_images
        print(f"{faces.num_images} records of {mean:.0f} bytes on average, batches of {arguments.batch}, {arguments.threads} threads")
        if not _equal(faces):
            return 1
        if torch.cuda.is_available():
            _compare_on_gpu(faces, arguments)
        else:
            _compare_on_cpu(faces, arguments)
    return 0


def _synthetic(folder: Path) -> Path:
    write_synthetic(folder / "faces", 100, 40, seed=0)
    pack([folder / "faces"], folder / "set", 4)
    return folder / "set"


def _compare_on_cpu(faces: ShardSet, arguments: argparse.Namespace) -> None:
    """Each turn is timed by the wall; with as many threads as cores, that is what a step waits."""
    options = {"num_threads": arguments.threads}
    bare = _bare(faces, arguments.batch, arguments.threads)
    loaders = {name: FaceLoader(faces.path, arguments.batch, backend=name, **options) for name in ("table", "reader")}
    pillow = iter(_pillow(faces, arguments.batch, arguments.threads))
    contenders: dict[str, Callable[[], object]] = {
        "bare": bare.run,
        **{name: lambda loader=loader: next(loader) for name, loader in loaders.items()},
        "pillow": lambda: next(pillow),
    }
    rates = {name: [] for name in contenders}
    for turn in range(1 + arguments.repeats):
        for name, run in contenders.items():
            time.sleep(_SETTLE_S)
            begin = time.perf_counter()
            for _ in range(arguments.batches):
                run()
            if turn:  # the first warms up
                rates[name].append(arguments.batches * arguments.batch / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(
            f"{name:<8}{medians[name]:8,.0f} images/s (lowest {min(values):,.0f}, highest {max(values):,.0f})   "
            f"{medians[name] / medians['bare']:.2f} x bare   {medians[name] / medians['pillow']:.2f} x pillow"
        )


def _compare_on_gpu(faces: ShardSet, arguments: argparse.Namespace) -> None:
    ways = [Decode("mixed", hw_load) for hw_load in (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)] + [Decode("cpu")]
    rates = {}
    for decode in ways:
        loader = FaceLoader(faces.path, arguments.batch, device_id=0, decode=decode, num_threads=arguments.threads)
        for _ in range(arguments.batches):
            next(loader)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(arguments.batches * arguments.repeats):
            next(loader)
        torch.cuda.synchronize()
        rates[decode] = arguments.batches * arguments.repeats * arguments.batch / (time.perf_counter() - begin)
        print(f"{decode.device} hw_load {decode.hw_load:.2f}: {rates[decode]:8,.0f} images/s")
    best = max(rates, key=rates.get)
    print(f"fastest on {torch.cuda.get_device_name()}: data.decode.device={best.device} data.decode.hw_load={best.hw_load}")


def _bare(faces: ShardSet, batch: int, threads: int) -> dali.Pipeline:
    pipeline = dali.Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        encoded, _ = fn.readers.mxnet(path=[str(shard) for shard in faces.shards], index_path=[str(faces.index)])
        pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False))
    pipeline.build()
    return pipeline


class _Records(Dataset):
    def __init__(self, faces: ShardSet) -> None:
        self._path, self._faces, self._fetcher = faces.path, None, None

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        if self._fetcher is None:  # in the worker process
            self._faces = open_set(self._path)
            self._fetcher = RecordFetcher(self._faces)
        (image,) = self._fetcher.fetch(np.array([number]))
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        if number % 2:
            pixels = pixels[:, ::-1]
        normalised = (pixels.transpose(2, 0, 1).astype(np.float32) - 127.5) / 127.5
        return torch.from_numpy(normalised), int(self._faces.labels[number])


class _Endless(torch.utils.data.Sampler):
    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    def __iter__(self):
        while True:
            yield from np.random.default_rng(0).permutation(self._num_images).tolist()


def _pillow(faces: ShardSet, batch: int, workers: int) -> DataLoader:
    return DataLoader(_Records(faces), batch, sampler=_Endless(faces.num_images), num_workers=workers, prefetch_factor=2)


def _equal(faces: ShardSet) -> bool:
    """Whether both backends show, of every record of some batches, the pixels that Pillow decodes."""
    for backend in ("table", "reader"):
        loader = FaceLoader(faces.path, min(32, faces.num_images), backend=backend, augment=Augment(flip=0.0))
        for _ in range(4):
            batch = next(loader)
            for name, image in zip(batch.records(), batch.images, strict=True):
                shard, _, offset, _, _ = name.split()
                (encoded,) = RecordFetcher(faces).fetch(faces.numbers([faces.path / shard], [int(offset)]))
                expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
                if (worst := float(np.abs(image.numpy() - expected).max())) > TOLERANCE:
                    print(f"{backend}: {name} differs from Pillow's by {worst:.3f}", file=sys.stderr)
                    return False
    return True


if __name__ == "__main__":
    sys.exit(main())
