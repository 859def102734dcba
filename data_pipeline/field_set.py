"""The field's ``train.rec`` + ``train.idx``, read as it is: which records hold images, and whose they are."""

import fcntl
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.output import new_folder
from data_pipeline.quarantine import Quarantine
from data_pipeline.record_table import MAX_CLASSES, RECORD, are_classes, read_table, write_table_header
from data_pipeline.recordio import RecordReader, index_blocks, read_headers, read_index

_KEEP_FROM = 16 << 20  # bytes of index, about a million records; what is found in a smaller set is found again in a second
_INDEX_BLOCK = 1 << 22  # bytes, some 200,000 records at a time
_ROWS = 1 << 16
_TABLE, _FACTS = "records.npy", "set.json"
_OWNED = re.compile(rf"{re.escape(_TABLE)}|{re.escape(_FACTS)}")


@dataclass(frozen=True)
class FieldFacts:
    """What there is to know of a field set beside its table of records."""

    num_images: int
    num_classes: int
    other_records: int  # header and identity records
    digest: str


def find_field_pair(path: Path) -> tuple[Path, Path]:
    """The .rec and .idx of a field set at ``path``: the file itself, ``train.rec`` in the folder, or the only .rec there."""
    if path.is_file() and path.suffix == ".rec":
        rec = path
    elif path.is_dir():
        found = sorted(path.glob("*.rec"))
        rec = path / "train.rec" if path / "train.rec" in found else found[0] if len(found) == 1 else None
        if rec is None:
            what = f"{len(found)} .rec files ({', '.join(p.name for p in found[:3])}, ...) without a sidecar" if found else "no .rec file"
            raise DataError(f"{path}: expected shards.json (a packed set), train.rec or one .rec file; found {what}")
    else:
        found = "another file" if path.exists() else "nothing"
        raise DataError(f"{path}: expected a folder with a set of shards or a .rec file, found {found}")
    index = rec.with_suffix(".idx")
    if not rec.stat().st_size:
        raise DataError(f"{rec}: the file is empty")
    if not index.is_file():
        raise DataError(f"{index}: missing; a .rec file is read through its index (DALI's `rec2idx {rec.name} {index.name}` makes one)")
    return rec, index


def open_field(rec: Path, index: Path, quarantine: Quarantine | None) -> tuple[np.ndarray, FieldFacts]:
    """The table of the image records ([N] of ``RECORD``, sorted by offset), without those in quarantine, and the facts.

    Of a set of a million records or more, the first process of a node makes the table and keeps it on the disk, the others wait for it
    and map it. Raises ``DataError`` for what ``shard_set.open_set`` names.
    """
    if index.stat().st_size < _KEEP_FROM:
        with tempfile.TemporaryFile() as table:
            facts = _read_field(rec, index, quarantine, table)
            table.seek(0)
            return np.load(table, allow_pickle=False), facts
    folder = _cache_folder(rec, index, quarantine)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _FACTS).is_file():
            with new_folder(folder, _OWNED, force=True) as fresh, open(fresh / _TABLE, "wb+") as table:
                facts = _read_field(rec, index, quarantine, table)
                (fresh / _FACTS).write_text(json.dumps(asdict(facts)))
    facts = FieldFacts(**json.loads((folder / _FACTS).read_text()))
    return read_table(folder / _TABLE, facts.num_images), facts


def _cache_folder(rec: Path, index: Path, quarantine: Quarantine | None) -> Path:
    """Beside the set, or where that cannot be written in the user's cache; another one when any of the files changes."""
    files = [rec, index] + ([] if quarantine is None else [quarantine.path])
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f".{rec.stem}.table-{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"
    if os.access(rec.parent, os.W_OK):
        return rec.parent / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvface-deepspeed" / name


class _OutOfOrder(Exception):
    """The index does not list the records as they follow each other in the file."""


def _read_field(rec: Path, index: Path, quarantine: Quarantine | None, table: BinaryIO) -> FieldFacts:
    """Write the table: a piece at a time where the index lists the records as they follow each other, as it nearly always does."""
    unsound = np.array([] if quarantine is None else [at for _, at in quarantine.places], np.int64)
    try:
        return _write_table(rec, index, index_blocks(index, _INDEX_BLOCK), unsound, table)
    except _OutOfOrder:
        keys, offsets = read_index(index)
        order = np.argsort(offsets, kind="stable")
        return _write_table(rec, index, [(keys[order], offsets[order])], unsound, table)


def _write_table(
    rec: Path, index: Path, blocks: Iterable[tuple[np.ndarray, np.ndarray]], unsound: np.ndarray, table: BinaryIO
) -> FieldFacts:
    """``blocks``: keys and offsets. ``unsound``: offsets of the records in quarantine, [E] int64."""
    table.seek(0)
    table.truncate()
    write_table_header(table, 0)
    start, last, num_images, classes, digest = table.tell(), -1, 0, 1, hashlib.sha256()
    header, others, bad = None, [], _BadLabels(rec)
    for keys, offsets in blocks:
        before = np.concatenate([[last], offsets[:-1]])
        last = offsets[-1]
        if (offsets < before).any():
            raise _OutOfOrder
        if (offsets == before).any():
            raise DataError(f"{index}: lists offset {offsets[offsets == before][0]} more than once; make the index again")
        if keys.max() >= 1 << 32:
            raise DataError(f"{index}: key {keys.max()}, expected less than 2^32; make the index again")
        if len(unsound):
            sound = ~np.isin(offsets, unsound)
            keys, offsets = keys[sound], offsets[sound]
        found = read_headers(rec, keys, offsets)
        images = found.is_image
        for at in offsets[(keys == 0) & ~images].tolist():  # wherever it stands: merged files have it last
            header = RecordReader(rec).read_at(at, 0).labels
        others.append(offsets[~images])
        labels = found.labels[images]
        records = np.zeros(len(labels), RECORD)
        records["offset"], records["length"], records["key"] = offsets[images], found.lengths[images], keys[images]
        is_class = are_classes(labels, MAX_CLASSES)
        records["label"] = np.where(is_class, labels, 0)
        bad.add(records, labels, ~is_class)
        classes = max(classes, int(records["label"].max(initial=0)) + 1)
        num_images += len(records)
        digest.update(records.view(np.uint8))
        table.write(records.view(np.uint8))
    if not num_images:
        raise DataError(f"{rec}: no image record among those that {index.name} lists")
    others = np.concatenate(others)
    announced = announced_classes(header, others, unsound)
    if announced is not None and classes > announced:
        table.seek(start)
        while len(records := np.fromfile(table, RECORD, _ROWS)):
            bad.add(records, records["label"], records["label"] >= announced)
    num_classes = classes if announced is None else announced
    bad.refuse(num_images, num_classes)
    table.seek(0)
    write_table_header(table, num_images)
    return FieldFacts(num_images, num_classes, len(others), digest.hexdigest())


class _BadLabels:
    """Counts image records without a class, and names the first."""

    def __init__(self, rec: Path) -> None:
        self._rec, self._count, self._first = rec, 0, (math.inf, "")  # offset, and what there is to say

    def add(self, records: np.ndarray, labels: np.ndarray, bad: np.ndarray) -> None:
        """``labels`` [n] as they stand in the records; ``bad`` [n] bool."""
        for i in np.flatnonzero(bad)[:1]:
            offset, key = int(records["offset"][i]), records["key"][i]
            self._first = min(self._first, (offset, f"record at offset {offset} (key {key}): label {labels[i]:g}"))
        self._count += int(bad.sum())

    def refuse(self, num_images: int, num_classes: int) -> None:
        if self._count:
            raise DataError(
                f"{self._rec}: {self._first[1]}, expected a whole number in [0, {num_classes}); {self._count} of {num_images} image "
                "records are like that: mend the labels, or let `python -m data_pipeline verify` put those records in quarantine"
            )


def announced_classes(header: tuple[float, ...] | None, others: np.ndarray, unread: np.ndarray) -> int | None:
    """C of a field set by its header record (key 0, labels [N + 1, N + 1 + C]); None without one, or when it says nothing usable.

    Its labels are float32. Above 2^24 they are not exact, and the identity records behind the images are counted. ``others``: offsets,
    sorted, of the records without an image, the header's among them; ``unread``: of those that cannot be read.
    """
    if header is None:
        return None
    if len(header) == 2 and header[0] < header[1] <= MAX_CLASSES:
        return int(header[1] - header[0])
    return len(others) - 1 + int((unread > others[1]).sum()) if len(others) > 1 else None
