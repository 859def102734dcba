"""Small image folders and record files that the data tests share. Framing is written with ``struct`` here, not with the code under test."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

MAGIC = struct.pack("<I", 0xCED7230A)


def jpeg(colour: tuple[int, int, int] = (90, 120, 150), side: int = 112, mark: int = 0) -> bytes:
    """A one-colour JPEG with a darker block at the left, so that a mirror image differs; ``mark`` makes bytes differ."""
    pixels = np.full((side, side, 3), colour, np.uint8)
    pixels[:, : side // 4] //= 2
    pixels[0, 0] = mark % 256
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def commented(image: bytes, comment: bytes) -> bytes:
    """A JPEG with a comment segment right at its start: the same picture, other bytes."""
    return image[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + image[2:]


def colour_of(label: int) -> tuple[int, int, int]:
    """Encodes a label below 64 in four steps per channel, which JPEG keeps apart."""
    return tuple(40 + 60 * (label // 4**channel % 4) for channel in range(3))


def label_of(image: np.ndarray) -> int:
    """Reads ``colour_of`` off a [3, 112, 112] float image in [-1, 1]."""
    middle = (image[:, 40:70, 40:70].mean(axis=(1, 2)) * 0.5 + 0.5) * 255
    return int(sum(round((value - 40) / 60) * 4**channel for channel, value in enumerate(middle)))


def image_folder(root: Path, images_per_identity: dict[str, int]) -> Path:
    """``root/<identity>/<k>.jpg``; the colour encodes the identity's place in sorted order, every file's bytes are its own."""
    for label, (name, count) in enumerate(sorted(images_per_identity.items())):
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k}.jpg").write_bytes(jpeg(colour_of(label), mark=7 * k))
    return root


def framed(payload: bytes, cflag: int = 0) -> bytes:
    return MAGIC + struct.pack("<I", cflag << 29 | len(payload)) + payload + bytes(-len(payload) % 4)


def payload(label: float | list[float], image: bytes, id: int = 0) -> bytes:
    if isinstance(label, list):
        return struct.pack("<IfQQ", len(label), 0.0, id, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, id, 0) + image


def write_records(rec: Path, records: list[tuple[int, float | list[float], bytes]], shuffle: int | None = None) -> list[int]:
    """Write (key, label or labels, image) as a .rec file with its .idx; ``shuffle``: seed for the order of the index lines."""
    body, offsets = b"", []
    for key, label, image in records:
        offsets.append(len(body))
        body += framed(payload(label, image, key))
    lines = [f"{key}\t{offset}\n" for (key, _, _), offset in zip(records, offsets, strict=True)]
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(lines)
    rec.write_bytes(body)
    rec.with_suffix(".idx").write_text("".join(lines))
    return offsets


def field_records(images_per_identity: list[int]) -> list[tuple[int, float | list[float], bytes]]:
    """The field's layout: a header record, the images, then one record of labels alone per identity."""
    images = [(float(label), jpeg(colour_of(label), mark=7 * k)) for label, count in enumerate(images_per_identity) for k in range(count)]
    first = len(images) + 1
    records: list = [(0, [float(first), float(first + len(images_per_identity))], b"")]
    records += [(key, label, image) for key, (label, image) in enumerate(images, 1)]
    start = 1
    for label, count in enumerate(images_per_identity):
        records.append((first + label, [float(start), float(start + count)], b""))
        start += count
    return records
