"""Opens a set of record shards: one that ``pack`` wrote, or the field's ``train.rec`` + ``train.idx``, read as it is."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.field_set import find_field_pair, open_field
from data_pipeline.names import is_plain_name
from data_pipeline.quarantine import Quarantine, find_quarantine
from data_pipeline.record_table import read_table

FORMAT_VERSION = 2
SIDECAR_NAME = "shards.json"
TABLE_NAME = "records.npy"
INDEX_NAME = "shards.idx"
IDENTITIES_NAME = "identities.json"
_BLOCK = 1 << 22  # records looked at at a time: a copy of a whole column would be large


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a packed set."""

    name: str
    bytes: int
    records: int


@dataclass(frozen=True)
class Sidecar:
    """``shards.json``: what ``pack`` wrote, so that what is read later can be compared with it.

    Small whatever the size of the set. What there is per record lies in ``records.npy`` (``record_table.RECORD``), the names of the
    identities in ``identities.json`` (the position is the label).
    """

    format_version: int
    num_images: int
    num_classes: int
    seed: int
    shards: list[ShardInfo]
    sha256: dict[str, str]  # of the files beside it that are not shards

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """Raises ``DataError`` when the file is not a sidecar of this format version, or contradicts itself."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable sidecar ({error}); pack the set again") from error
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version!r}, this code reads {FORMAT_VERSION}; pack the set again")
        try:
            sidecar = cls(**{**raw, "shards": [ShardInfo(**shard) for shard in raw["shards"]]})
            found = sum(shard.records for shard in sidecar.shards)
        except (TypeError, KeyError, AttributeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise DataError(f"{path}: expected exactly the keys {names} ({error}); pack the set again") from error
        if strangers := [shard.name for shard in sidecar.shards if not is_plain_name(shard.name)]:
            raise DataError(f"{path}: names the shard {strangers[0]!r}, which is no file beside it; pack the set again")
        if found != sidecar.num_images:
            raise DataError(f"{path}: the shards' records add up to {found}, the file announces {sidecar.num_images}; pack the set again")
        return sidecar


class ShardSet:
    """The image records of a set: where they are and whose they are. Open one with ``open_set``.

    Attributes:
        layout: "packed" (ours, with a sidecar) or "field" (others' .rec and .idx, image records only).
        shards, shard_bytes: the record files and their sizes. ``index``: the index on the disk.
        records: [N] of ``record_table.RECORD``, sorted by offset; offsets count from the start of the shards' concatenation. Of a packed
            or a large set a memory map: the processes of a node share it.
        num_images, num_classes: N and C. Labels lie in [0, C); a set may have classes without an image.
        quarantine: what ``verify`` put aside, or None. ``excluded``: numbers of those records in ``records``, sorted [E] int64. Those of
            a field set are not in ``records`` at all.
        other_records: header and identity records of a field set, which are left out. ``sidecar``: of a packed set, else None.
        digest: hex SHA-256 that tells this set from another, quarantine included.
    """

    def __init__(
        self,
        path: Path,
        shards: list[Path],
        index: Path,
        records: np.ndarray,
        num_classes: int,
        digest: str,
        *,
        sidecar: Sidecar | None = None,
        other_records: int = 0,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.path, self.shards, self.index, self.records, self.num_classes = path, shards, index, records, num_classes
        self.sidecar, self.other_records, self.quarantine = sidecar, other_records, quarantine
        self.layout = "field" if sidecar is None else "packed"
        self.shard_bytes = [shard.stat().st_size for shard in shards]
        self.starts = np.cumsum([0, *self.shard_bytes])
        self.num_images = len(records)
        self.excluded = np.array([], np.int64)
        self.digest = digest
        if sidecar is not None and quarantine is not None:
            self.excluded = np.unique(self.numbers([path / shard for shard, _ in quarantine.places], [at for _, at in quarantine.places]))
            self.digest = hashlib.sha256(digest.encode() + self.excluded.tobytes()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        """[N] in the order of ``records``."""
        return self.records["label"]

    def label_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first record, labels) of one block of records after the other."""
        for start in range(0, self.num_images, _BLOCK):
            yield start, self.labels[start : start + _BLOCK]

    @cached_property
    def images_per_class(self) -> np.ndarray:
        """[C] int64, without those in quarantine."""
        counts = np.zeros(self.num_classes, np.int64)
        for start, labels in self.label_blocks():
            if labels.max() >= self.num_classes:
                first = start + int(np.argmax(labels >= self.num_classes))
                raise DataError(
                    f"{self.path / TABLE_NAME}: {self.where(first)}: label {self.labels[first]}, expected less than {self.num_classes}; "
                    "pack the set again"
                )
            counts += np.bincount(labels, minlength=self.num_classes)
        return counts - np.bincount(self.labels[self.excluded], minlength=self.num_classes)

    def identities(self) -> list[str]:
        """The names of the classes, [C]: the folders that were packed; of a field set the labels, with zeros in front to sort them."""
        if self.sidecar is None:
            width = len(str(self.num_classes - 1))
            return [f"{label:0{width}d}" for label in range(self.num_classes)]
        path = self.path / IDENTITIES_NAME
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); pack the set again") from error
        if not isinstance(names, list) or len(names) != self.num_classes:
            raise DataError(f"{path}: expected a list of {self.num_classes} names; pack the set again")
        return names

    def where(self, number: int) -> str:
        """Names a record for an error message: "/data/shard_00006.rec: record at offset 5762928 (key 5123)"."""
        shard, offset, key = self.place(number)
        return f"{self.shards[shard]}: record at offset {offset} (key {key})"

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Names records for a log: "shard_00006.rec offset 5762928 (key 5123)"."""
        return [f"{self.shards[shard].name} offset {offset} (key {key})" for shard, offset, key in map(self.place, numbers)]

    def place(self, number: int) -> tuple[int, int, int]:
        """(shard, offset in it, key) of a record."""
        records = self.records[number : number + 1]
        (shard,), (offset,) = self.places(records)
        return int(shard), int(offset), int(records["key"][0])

    def places(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shards of rows of the table, and the offsets in them: [n] int64 each."""
        offsets = records["offset"].astype(np.int64)
        shards = self.starts.searchsorted(offsets, "right") - 1
        return shards, offsets - self.starts[shards]

    def numbers(self, shards: Sequence[Path | str], offsets: Sequence[int]) -> np.ndarray:
        """The numbers ([n] int64) of the records at ``offsets`` of ``shards``. Raises ``DataError`` where there is none."""
        starts = dict(zip(map(str, self.shards), self.starts.tolist(), strict=False))
        wanted = np.array([starts.get(str(shard), -1 - at) + at for shard, at in zip(shards, offsets, strict=True)], np.int64)
        at = _bisect(self.records["offset"], wanted).clip(max=self.num_images - 1)
        strangers = np.flatnonzero(self.records["offset"][at] != wanted.astype(np.uint64))
        if len(strangers):
            first = strangers[0]
            raise DataError(f"{self.path}: has no record at offset {offsets[first]} of {shards[first]}; was the set changed?")
        return at

    def write_reader_index(self, path: Path, keep: np.ndarray) -> list[Path]:
        """Write a DALI index of the records where ``keep`` ([N] bool) is set; returns the shards that it spans, in order.

        DALI 2.4 finds the file of an offset by stepping at most one file ahead per record, and not at all at the last record. So
        shards without a kept record are left out of the list, and the last record stands twice: DALI skips the empty first copy.
        """
        kept = self.records["offset"][keep].astype(np.int64)
        counts = np.histogram(kept, bins=self.starts)[0]
        used = np.flatnonzero(counts)
        starts = np.cumsum([0, *(self.shard_bytes[shard] for shard in used)])[:-1]
        kept = kept + np.repeat(starts - self.starts[used], counts[used])
        with open(path, "w", encoding="ascii") as file:
            for start in range(0, len(kept), 1 << 20):
                file.writelines(f"{key}\t{offset}\n" for key, offset in enumerate(kept[start : start + (1 << 20)].tolist(), start))
            file.write(f"{len(kept)}\t{kept[-1]}\n")
        return [self.shards[shard] for shard in used]


def open_set(path: str | os.PathLike) -> ShardSet:
    """Open a packed set (its folder) or a field set (its folder, or the .rec file with the .idx beside it).

    A packed set opens in a moment whatever its size. Of a field set the index and the first bytes of every record are read, about a
    million per second from memory; what was found in a set of a million or more is kept beside it, or in the user's cache folder.
    Raises ``DataError`` when files are missing or empty, the shards' sizes or the table disagree with the sidecar, or (field set, whose
    labels are read here) a record does not parse or its label is no whole number in [0, C).
    """
    path = Path(path)
    if (path / SIDECAR_NAME).is_file():
        return _open_packed(path)
    rec, index = find_field_pair(path)
    quarantine = find_quarantine(rec, [rec])
    records, found = open_field(rec, index, quarantine)
    return ShardSet(path, [rec], index, records, found.num_classes, found.digest, other_records=found.other_records, quarantine=quarantine)


def size_problem(shard: Path, expected: int) -> str | None:
    """What is wrong with a shard's existence or size in bytes, or None."""
    if not shard.is_file():
        return f"{shard}: the sidecar lists this shard, but it is missing; copy it again or pack the set again"
    size = shard.stat().st_size
    if size != expected:
        return f"{shard}: {size} bytes, the sidecar says {expected}; copy it again or pack the set again"
    return None


def _open_packed(path: Path) -> ShardSet:
    sidecar = Sidecar.read(path / SIDECAR_NAME)
    shards = [path / shard.name for shard in sidecar.shards]
    for shard, info in zip(shards, sidecar.shards, strict=True):
        if problem := size_problem(shard, info.bytes):
            raise DataError(problem)
    records = read_table(path / TABLE_NAME, sidecar.num_images)
    end = sum(info.bytes for info in sidecar.shards)
    if int(records["offset"][-1]) + int(records["length"][-1]) != end:
        raise DataError(f"{path / TABLE_NAME}: ends at another byte than the shards, {end}; pack the set again")
    digest = hashlib.sha256((path / SIDECAR_NAME).read_bytes()).hexdigest()
    quarantine = find_quarantine(path, shards)
    return ShardSet(path, shards, path / INDEX_NAME, records, sidecar.num_classes, digest, sidecar=sidecar, quarantine=quarantine)


def _bisect(column: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """As ``np.searchsorted``, which would copy a column of a table as a whole."""
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(column), np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        less = column[np.minimum(middle, len(column) - 1)].astype(np.int64) < wanted
        low, high = np.where(less & (low < high), middle + 1, low), np.where(less, high, middle)
    return low
