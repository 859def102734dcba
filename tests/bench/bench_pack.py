"""How fast ``pack`` is and how much memory it takes, as a user starts it: images per second of CPU time, and what grows with the set.

    python -m tests.bench.bench_pack
    python -m tests.bench.bench_pack --records 200000 --files 20000 --workers 1

Two sources are made, each with a tenth of it: a field set (train.rec, train.idx, header and identity records) of tiny JPEGs, 100 per
identity, and a folder of JPEG files of 6 KB, 25 per identity. That the small sets hold all images byte for byte under their labels is
checked first. CPU time is that of all processes together; ``images/s`` are those of a second of it in the whole run, ``steady`` of those
images that the large set has more than the small one: without start-up, half a second a process. Memory is the peak of anonymous memory
(RssAnon, sampled) of the parent and of its largest worker; pages of mapped files, which the system takes back at need, are left out.
Some gigabytes are written to --scratch, and deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.recordio import RecordReader, RecordWriter
from tests.training import ROOT

SHARDS = 64
SAMPLE_S = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2_000_000, help="of the field set")
    parser.add_argument("--files", type=int, default=200_000, help="in the folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", type=Path, help="folder to write in; default: the system's for temporary files")
    arguments = parser.parse_args()
    print(f"{'source':<9}{'images':>10}{'workers':>9}{'wall s':>9}{'images/s':>11}{'steady':>9}{'parent MiB':>12}{'worker MiB':>12}")
    with tempfile.TemporaryDirectory(prefix="bench_pack_", dir=arguments.scratch) as scratch:
        for source in (Records(Path(scratch), arguments.records), Files(Path(scratch), arguments.files)):
            if not measure(source, Path(scratch) / "set", arguments.workers):
                return 1
    return 0


def measure(source: Records | Files, out: Path, all_workers: list[int]) -> bool:
    """Print a line for each number of workers and size; False when an image is missing or another one."""
    runs: dict[tuple[int, int], Run] = {}
    for count in (source.count // 10, source.count):
        path = source.write(count)
        os.sync()  # else writing it back would be counted
        for workers in all_workers:
            run = runs[workers, count] = packed(path, out, workers, count)
            if count < source.count and Counter(stored(out)) != Counter(digests(source.images(count))):
                print(f"{path}: the packed set holds other images, or others' labels", file=sys.stderr)
                return False
            before = runs[workers, source.count // 10]
            steady = f"{(run.images - before.images) / (run.cpu_s - before.cpu_s):,.0f}" if run is not before else ""
            print(
                f"{source.name:<9}{count:>10,}{workers:>9}{run.wall_s:>9.1f}{count / run.cpu_s:>11,.0f}{steady:>9}"
                f"{run.parent_mib:>12.1f}{run.worker_mib:>12.1f}",
                flush=True,
            )
            subprocess.run(["rm", "-r", out], check=True)
    return True


class Records:
    """A field set of tiny JPEGs: a header record, the images, a record per identity."""

    name = "records"

    def __init__(self, scratch: Path, count: int) -> None:
        self._scratch, self.count = scratch, count
        self._template = drawn(np.random.default_rng(0), side=4, mode="L", quality=75)

    def images(self, count: int) -> Iterator[tuple[int, bytes]]:
        return ((i // 100, numbered(self._template, i)) for i in range(count))

    def write(self, count: int) -> Path:
        folder = self._scratch / f"records_{count}"
        folder.mkdir()
        identities = -(-count // 100)
        with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
            writer.write(0, [float(count + 1), float(count + 1 + identities)], b"")
            for key, (label, image) in enumerate(self.images(count), 1):
                writer.write(key, float(label), image)
            for identity in range(identities):
                writer.write(count + 1 + identity, [float(1 + 100 * identity), float(min(101 + 100 * identity, count + 1))], b"")
        return folder


class Files:
    """A folder of JPEG files of the size that aligned faces have."""

    name = "files"

    def __init__(self, scratch: Path, count: int) -> None:
        self._scratch, self.count = scratch, count
        rng = np.random.default_rng(0)
        self._templates = [drawn(rng, side=28, mode="RGB", quality=85) for _ in range(64)]

    def images(self, count: int) -> Iterator[tuple[int, bytes]]:
        return ((i // 25, numbered(self._templates[i % 64], i)) for i in range(count))

    def write(self, count: int) -> Path:
        folder = self._scratch / f"files_{count}"
        for i, (label, image) in enumerate(self.images(count)):
            identity = folder / f"id_{label:07d}"
            if i % 25 == 0:
                identity.mkdir(parents=True)
            (identity / f"{i % 25:04d}.jpg").write_bytes(image)
        return folder


def drawn(rng: np.random.Generator, side: int, mode: str, quality: int) -> bytes:
    """A JPEG of 112x112 pixels: ``side`` x ``side`` random colours, blurred."""
    colours = Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    colours.resize((112, 112)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def numbered(image: bytes, number: int) -> bytes:
    """The same picture in bytes of its own: a comment at the start says the number."""
    return image[:2] + b"\xff\xfe\0\x0a" + b"%08d" % number + image[2:]


def digests(images: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    return ((label, hashlib.md5(image).digest()) for label, image in images)


def stored(out: Path) -> Iterator[tuple[int, bytes]]:
    """(label, digest) of every record of a packed set."""
    for shard in sorted(out.glob("shard_*.rec")):
        yield from digests((int(record.labels[0]), record.image) for record in RecordReader(shard))


@dataclass(frozen=True)
class Run:
    """One run of ``python -m data_pipeline pack``."""

    images: int
    wall_s: float
    cpu_s: float  # all processes
    parent_mib: float
    worker_mib: float  # the largest; 0: the parent packed alone


def packed(source: Path, out: Path, workers: int, images: int) -> Run:
    command = [sys.executable, "-m", "data_pipeline", "pack", str(source), str(out), "--shards", str(SHARDS), "--workers", str(workers)]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peaks: Counter[int] = Counter()
    ended = threading.Event()
    sampler = threading.Thread(target=sample, args=(process.pid, peaks, ended))
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)  # its usage includes that of the workers, which it waited for
    wall_s = time.monotonic() - begin
    ended.set()
    sampler.join()
    if status:
        raise RuntimeError(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    parent_kib = peaks.pop(process.pid)
    return Run(images, wall_s, usage.ru_utime + usage.ru_stime, parent_kib / 1024, max(peaks.values(), default=0) / 1024)


def sample(parent: int, peaks: Counter[int], ended: threading.Event) -> None:
    """Note the peak of RssAnon, KiB, of ``parent`` and of every process that it started."""
    while not ended.wait(SAMPLE_S):
        try:
            started = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        for pid in (parent, *map(int, started)):
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue
            anonymous = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
            peaks[pid] = max([peaks[pid], *anonymous])


if __name__ == "__main__":
    sys.exit(main())
