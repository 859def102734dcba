"""How fast verify checks a packed set, beside the least that it could cost: zlib.crc32 and a strict decode of the same images, bare.

``python -m tests.bench.bench_verify``. First verify must find nothing, and the bare checksums must be those in the set's table. Then all
take turns in one process: one worker, CPU time, the files in the page cache. A few hundred synthetic faces, or those of --faces, are
repeated. Last, what is noticed: of images with one changed byte each, the share that strict decoding, Pillow and the CRC32 find.

Exit code 1 if the results are wrong; how fast verify is decides nothing.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader, RecordWriter
from data_pipeline.shard_set import open_set
from data_pipeline.synthetic import write_synthetic
from data_pipeline.verify import verify
from tests.bench.timing import medians

CHANGED = 3000
DISTINCT = 400  # images; their number of bytes and codes is what matters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--faces", type=Path, help="folder <identity>/<image>.jpg of 112 x 112 pixels; default: synthetic faces")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_verify_") as folder:
        return measure(packed_set(Path(folder), arguments.images, arguments.faces), arguments.repeats)


def packed_set(folder: Path, count: int, faces: Path | None) -> Path:
    """A packed set of ``count`` images of 100 identities in four shards."""
    if faces is None:
        faces = folder / "faces"
        write_synthetic(faces, DISTINCT // 20, 20, seed=0)
    images = [path.read_bytes() for path in sorted(faces.glob("*/*.jpg"))[:DISTINCT]]
    (folder / "field").mkdir()
    with RecordWriter(folder / "field/train.rec", folder / "field/train.idx") as writer:
        for key in range(count):
            writer.write(key, float(key % 100), images[key % len(images)])
    pack([folder / "field"], folder / "packed", 4, workers=1)
    return folder / "packed"


def measure(path: Path, repeats: int) -> int:
    """Print images per second; the exit code."""
    faces = open_set(path)
    images = [record.image for shard in faces.shards for record in RecordReader(shard)]
    expected = np.array([zlib.crc32(image) for image in images])
    report = verify(path, workers=1)
    if report.findings or report.images != len(images) or not np.array_equal(faces.records["crc32"], expected):
        print(f"verify found {len(report.findings)} problems in {report.images} images, expected none in {len(images)}", file=sys.stderr)
        return 1
    contenders = {
        "verify --no-decode": lambda: verify(path, decode=False, workers=1),
        "zlib.crc32": lambda: [zlib.crc32(image) for image in images],
        "verify": lambda: verify(path, workers=1),
        "simplejpeg, strict": lambda: [simplejpeg.decode_jpeg(image, "GRAY", strict=True) for image in images],
    }
    taken = medians(contenders, repeats, "cpu")
    size = sum(map(len, images)) / len(images)
    print(f"verify  cpu, one core  {len(images)} images of {size:.0f} bytes (mean), in the page cache  median of {repeats}")
    for ours, floor in (("verify --no-decode", "zlib.crc32"), ("verify", "simplejpeg, strict")):
        speeds = [1000 * len(images) / taken[name] for name in (ours, floor)]
        print(f"images/s   {ours:19}{speeds[0]:9.0f}   bare {floor:19}{speeds[1]:9.0f}   time ratio {taken[ours] / taken[floor]:.2f}x")
    print_noticed(images[:DISTINCT])
    return 0


def print_noticed(images: list[bytes]) -> None:
    rng = np.random.default_rng(0)
    noticed = {"strict decoding": 0, "Pillow": 0, "CRC32": 0}
    for i in range(CHANGED):
        image = images[i % len(images)]
        changed = bytearray(image)
        changed[rng.integers(len(image))] ^= rng.integers(1, 256)
        noticed["strict decoding"] += fails(lambda data: simplejpeg.decode_jpeg(data, "GRAY", strict=True), changed)
        noticed["Pillow"] += fails(lambda data: Image.open(io.BytesIO(data)).load(), changed)
        noticed["CRC32"] += zlib.crc32(changed) != zlib.crc32(image)
    shares = "   ".join(f"{name} {count / CHANGED:.1%}" for name, count in noticed.items())
    print(f"one changed byte in each of {CHANGED} images is noticed by   {shares}")


def fails(decode: Callable[[bytes], object], data: bytearray) -> bool:
    try:
        decode(bytes(data))
    except Exception:  # Pillow's errors share no narrower base class
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
