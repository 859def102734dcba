"""Packs ``SRC/<identity>/<image>`` into globally shuffled shards, one index over all of them, and a sidecar that says what they hold."""

import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline import SIDE
from data_pipeline.errors import DataError
from data_pipeline.jpeg import jpeg_problem
from data_pipeline.output import new_folder, refuse_existing, write_file
from data_pipeline.recordio import RecordWriter, encode_payload
from data_pipeline.shard_set import FORMAT_VERSION, INDEX_NAME, MAX_CLASSES, SIDECAR_NAME, ShardInfo, Sidecar

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_OWNED = re.compile(rf"shard_\d{{5,}}\.rec|{re.escape(INDEX_NAME)}|{re.escape(SIDECAR_NAME)}")


def pack(
    source: Path,
    out: Path,
    shards: int,
    *,
    seed: int = 0,
    identities: Sequence[str] | None = None,
    force: bool = False,
    progress: bool = False,
) -> Sidecar:
    """Write the images of ``source`` as ``shards`` record files in the folder ``out``; returns the sidecar that lies beside them.

    The label of an image is the position of its identity among the sorted names (of ``identities``, when given). All images are
    shuffled with ``seed`` before they are cut into shards of equal counts (+-1): the same source and seed give the same bytes.
    JPEG files are stored byte for byte; other formats are encoded once (quality 95, 4:4:4). One image is in memory at a time.
    ``out`` appears when it is complete, or not at all (``output.new_folder``). ``progress`` draws a bar on stderr.

    Raises DataError: no such source, an identity without an image or (listed) without a folder, an image that cannot be read or
    is not 112 x 112, more shards than images, an ``out`` that exists (without ``force``).
    """
    refuse_existing(out, _OWNED, force)
    names, files, labels = _list_images(source, identities, progress)
    if not 1 <= shards <= len(files):
        raise DataError(f"--shards {shards}: must lie in [1, {len(files)}], the number of images in {source}")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{source}: {len(names)} identities; record labels are float32, which counts to {MAX_CLASSES}")
    if seed < 0:
        raise DataError(f"--seed {seed}: must not be negative")
    order = np.random.default_rng(seed).permutation(len(files))
    infos, key, base = [], 0, 0
    with new_folder(out, _OWNED, force=force) as folder, tqdm(total=len(files), unit="img", file=sys.stderr, disable=not progress) as bar:
        for number, share in enumerate(np.array_split(order, shards)):
            images = ((source / names[labels[i]] / files[i], int(labels[i])) for i in _counted(share, bar))
            info, offsets = _write_shard(folder / f"shard_{number:05d}.rec", images, first_key=key)
            write_file(folder / INDEX_NAME, "".join(f"{i}\t{base + at}\n" for i, at in enumerate(offsets, key)), append=True)
            infos.append(info)
            key, base = key + info.records, base + info.bytes
        counts = np.bincount(labels, minlength=len(names)).tolist()
        sidecar = Sidecar(FORMAT_VERSION, len(files), len(names), seed, names, counts, infos)
        write_file(folder / SIDECAR_NAME, sidecar.to_json())
    return sidecar


def _counted(share: np.ndarray, bar: tqdm) -> Iterator[int]:
    """The numbers in ``share``, each counted on ``bar`` when the next one is asked for."""
    for i in share.tolist():
        yield i
        bar.update()


def _write_shard(path: Path, images: Iterator[tuple[Path, int]], first_key: int) -> tuple[ShardInfo, list[int]]:
    """Write (file, label) pairs as records; returns what the sidecar says of the shard, and the records' offsets in it."""
    offsets, checksums = [], []
    with RecordWriter(path) as writer:
        for key, (file, label) in enumerate(images, first_key):
            image, size = _load(file)
            if size != (SIDE, SIDE):
                raise _wrong_size(file, size, (other for other, _ in images))
            payload = encode_payload(float(label), image, id=key)
            offsets.append(writer.write_payload(key, payload))
            checksums.append(f"{zlib.crc32(payload):08x}")
    return ShardInfo(path.name, writer.position, len(offsets), "".join(checksums)), offsets


def _load(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The bytes to store and the (width, height) of an image file."""
    data, problem = path.read_bytes(), None
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            if image.format in ("JPEG", "MPO"):
                problem = jpeg_problem(data)
            elif image.mode[0] in "IF":  # Pillow would clip them to white
                problem = f"holds more than 8 bits per pixel and channel (mode {image.mode}), expected 8"
            else:
                encoded = io.BytesIO()
                image.convert("RGB").save(encoded, "JPEG", quality=95, subsampling=0)
                data = encoded.getvalue()
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        raise DataError(f"{path}: cannot be read as an image ({error}); replace the file or take it out") from error
    if problem:
        raise DataError(f"{path}: {problem}; replace the file or take it out")
    return data, size


def _wrong_size(first: Path, size: tuple[int, int], others: Iterator[Path]) -> DataError:
    """Name the first few images of a wrong size: the one found, and those among the next 2,000."""
    wrong = [f"{first} is {size[0]}x{size[1]}"]
    for path in islice(others, 2000):
        size = _load(path)[1]
        if size != (SIDE, SIDE):
            wrong.append(f"{path} is {size[0]}x{size[1]}")
        if len(wrong) == 5:
            break
    return DataError(f"images must be {SIDE}x{SIDE} pixels: {'; '.join(wrong)}. Align and crop the faces to {SIDE}x{SIDE} first")


def _list_images(source: Path, wanted: Sequence[str] | None, progress: bool) -> tuple[list[str], list[str], np.ndarray]:
    """Identity names (sorted), file names, and the label of every file ([N] int32)."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; expected one folder per identity in it")
    if wanted is None:
        names = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    else:
        names = sorted(set(wanted))
        missing = [name for name in names if not (source / name).is_dir()]
        if missing:
            raise DataError(f"{source}: {len(missing)} of {len(names)} listed identities have no folder here, the first: {missing[0]!r}")
    files, labels, ignored, empty = [], [], [], []
    for label, name in enumerate(tqdm(names, desc="list", unit="id", file=sys.stderr, disable=not progress)):
        entries = sorted(entry.name for entry in (source / name).iterdir() if not entry.name.startswith("."))
        images = [entry for entry in entries if Path(entry).suffix.lower() in _SUFFIXES]
        ignored += [f"{name}/{entry}" for entry in entries if Path(entry).suffix.lower() not in _SUFFIXES]
        if not images:
            empty.append(name)
        files += images
        labels += [label] * len(images)
    if not files:
        raise DataError(f"{source}: no images; expected {source}/<identity>/<image>, with names in {', '.join(sorted(_SUFFIXES))}")
    if empty:
        raise DataError(f"{source}: {len(empty)} of {len(names)} identities have no image, the first: {empty[0]!r}; fill or delete them")
    if ignored and progress:
        print(f"ignored {len(ignored)} entries that are no images, the first: {source / ignored[0]}", file=sys.stderr)
    return names, files, np.array(labels, np.int32)


def read_identities(path: Path, split: str | None) -> list[str]:
    """The names in a JSON file: a list, or with ``split`` one list of an object ``{split: [names]}``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if isinstance(content, dict):
        splits = ", ".join(map(str, content))
        if split is None:
            raise DataError(f"{path}: holds the splits {splits}; choose one with --split")
        if split not in content:
            raise DataError(f"{path}: no split {split!r}; it holds {splits}")
        content = content[split]
    elif split is not None:
        raise DataError(f"{path}: holds one list, not splits; leave --split {split} out")
    if not isinstance(content, list) or not content or not all(isinstance(name, str) and name for name in content):
        raise DataError(f"{path}: expected a list of identity names, found {str(content)[:60]!r}")
    if unsafe := [name for name in content if name == ".." or Path(name).name != name]:
        raise DataError(f"{path}: {unsafe[0]!r} is no plain folder name")
    return content
