"""Finds images with the same bytes in a set of any size, in a bounded amount of memory."""

import hashlib
import json
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.output import replace_file
from data_pipeline.sources import Source
from data_pipeline.workers import Count, run_to_end

DROPPED_NAME = "dropped.npy"
DROPPED_FINDINGS_NAME = "dropped.jsonl"
_SAME, _OTHERS = "same bytes as another image of its identity", "same bytes as an image of another identity"
_CHECKSUM = np.dtype([("crc32", "<u4"), ("length", "<u4")])
_AT_ONCE = 1 << 19  # checksums sorted at a time, in about 30 MB
_BLOCK = 1 << 18
_LEAST = 4096  # images of a job
_FEW = 512  # images looked at before they are counted


def equal_images(checksums: np.ndarray, read: Callable[[int], object]) -> Iterator[list[int]]:
    """Groups of two or more numbers, ascending, whose images have the same bytes.

    Candidates have the same CRC32 and length (of 42 million images, some hundred pairs by chance); their bytes, by ``read``, decide.
    ``checksums``: [N] with the fields ``crc32`` and ``length``, a memory map will do; what has the length 0 is left out.
    """
    buckets = -(-len(checksums) // _AT_ONCE)
    for bucket in range(buckets):
        numbers, keys = _bucket(checksums, bucket, buckets)
        order = np.argsort(keys, kind="stable")
        numbers, keys = numbers[order], keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
        sizes = np.diff(starts, append=len(keys))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            groups = defaultdict(list)
            for number in numbers[start : start + size].tolist():
                groups[read(number)].append(number)
            yield from (group for group in groups.values() if len(group) > 1)


def _bucket(checksums: np.ndarray, bucket: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [n] int64 and keys [n] uint64 (CRC32 and length) of the images whose CRC32 falls into the bucket."""
    numbers, keys = [], []
    for start in range(0, len(checksums), _BLOCK):
        crc32, length = (checksums[field][start : start + _BLOCK] for field in ("crc32", "length"))
        mine = np.flatnonzero((crc32 % np.uint32(buckets) == bucket) & (length > 0))
        numbers.append(mine + start)
        keys.append(crc32[mine].astype(np.uint64) << np.uint64(32) | length[mine])
    return np.concatenate(numbers), np.concatenate(keys)


def duplicates(source: Source, group: Sequence[int]) -> Iterator[tuple[int, dict]]:
    """(number, finding) of each image of a group of equal ones that is one too many.

    Of one identity those are all but the first. Of several, where it is not known whose image it is, all.
    """
    labels = source.labels(np.array(group)).tolist()
    other = next((number for number, label in zip(group, labels, strict=True) if label != labels[0]), None)
    if other is None:
        for number in group[1:]:
            yield number, {"kind": _SAME, "image": source.where(number), "equal_to": source.where(group[0])}
    else:
        for number, label in zip(group, labels, strict=True):
            equal = other if label == labels[0] else group[0]
            yield number, {"kind": _OTHERS, "image": source.where(number), "equal_to": source.where(equal)}


def mark_duplicates(source: Source, folder: Path, workers: int, count: Count) -> str:
    """Read the whole source, write ``DROPPED_NAME`` in ``folder``: [N] bool, the duplicates; returns its SHA-256.

    ``DROPPED_FINDINGS_NAME`` names them. Checksums stay in ``folder``; those of images that have not changed are not taken again.
    """
    job = _Checksums(source, folder, max(_LEAST, -(-len(source) // 256)))
    starts = range(0, len(source), job.length)
    run_to_end(job, starts, workers, count)
    with open(folder / "checksums", "wb") as joined:
        for start in starts:
            with open(job.path(start), "rb") as part:
                shutil.copyfileobj(part, joined)
    checksums = np.memmap(folder / "checksums", _CHECKSUM, "r").view(np.ndarray)
    dropped = np.zeros(len(source), bool)
    with open(folder / DROPPED_FINDINGS_NAME, "w", encoding="ascii") as findings:
        for group in equal_images(checksums, source.read_one):
            for number, finding in duplicates(source, group):
                dropped[number] = True
                findings.write(json.dumps(finding | {"kind": f"{finding['kind']}, dropped"}) + "\n")
    np.save(folder / DROPPED_NAME, dropped)
    with open(folder / DROPPED_NAME, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Checksums:
    """Takes the checksums of ``length`` images from one on: the job of a worker. Those that cannot be read have the length 0."""

    source: Source
    folder: Path
    length: int

    def path(self, start: int) -> Path:
        return self.folder / f"range_{start // self.length:05d}.checksums"

    def __call__(self, start: int, count: Count) -> None:
        numbers, path = np.arange(start, min(start + self.length, len(self.source))), self.path(start)
        blocks = np.split(numbers, range(_FEW, len(numbers), _FEW))
        state = path.with_suffix(".json")  # written last: when the image that changed last did so
        if state.exists() and json.loads(state.read_text()) == max(map(self.source.changed, blocks)):
            count(len(numbers))
            return
        changed = 0
        with open(path, "wb") as file:
            for block in blocks:
                checksums = np.zeros(len(block), _CHECKSUM)
                for i, (data, when) in enumerate(self.source.read(block)):
                    changed = max(changed, when)
                    if not isinstance(data, DataError):
                        checksums[i] = (zlib.crc32(data), len(data))
                checksums.tofile(file)
                count(len(block))
        replace_file(state, json.dumps(changed))
