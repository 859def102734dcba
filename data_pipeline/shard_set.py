"""Opens a set of record shards: one that ``pack`` wrote, or the field's ``train.rec`` + ``train.idx``, read as it is."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.recordio import Headers, RecordReader, read_headers, read_index

FORMAT_VERSION = 1
SIDECAR_NAME = "shards.json"
INDEX_NAME = "shards.idx"
MAX_CLASSES = 1 << 24  # labels travel as float32, which is exact up to here


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a packed set."""

    name: str
    bytes: int
    records: int
    crc32: str  # 8 hex digits per record, in file order: CRC32 of the payload (header, label, image)


@dataclass(frozen=True)
class Sidecar:
    """``shards.json``: what ``pack`` wrote, so that what is read later can be compared with it."""

    format_version: int
    num_images: int
    num_classes: int
    seed: int
    identities: list[str]  # sorted; the position is the label
    images_per_identity: list[int]
    shards: list[ShardInfo]

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
            counts = {
                "images_per_identity": sum(sidecar.images_per_identity),
                "shards": sum(shard.records for shard in sidecar.shards),
                "shards' checksums": sum(len(shard.crc32) for shard in sidecar.shards) // 8,
            }
            classes = {"identities": len(sidecar.identities), "images_per_identity": len(sidecar.images_per_identity)}
        except (TypeError, KeyError, AttributeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise DataError(f"{path}: expected exactly the keys {names} ({error}); pack the set again") from error
        for expected, found in ((sidecar.num_images, counts), (sidecar.num_classes, classes)):
            for name, count in found.items():
                if count != expected:
                    raise DataError(f"{path}: {name} add up to {count}, the file announces {expected}; pack the set again")
        return sidecar


class ShardSet:
    """The image records of a set: where they are and whose they are. Open one with ``open_set``.

    Attributes:
        layout: "packed" (ours, with a sidecar) or "field" (others' .rec and .idx, image records only).
        shards, shard_bytes: the record files and their sizes. ``index``: the index on the disk.
        keys, offsets: [N] int64, sorted by offset; offsets count from the start of the shards' concatenation.
        num_images, num_classes: N and C. Labels lie in [0, C); a field set may have classes without an image.
        other_records: header and identity records of a field set, which are left out. ``sidecar``: of a packed set, else None.
    """

    def __init__(self, path: Path, shards: list[Path], index: Path, sidecar: Sidecar | None, keys: np.ndarray, offsets: np.ndarray) -> None:
        self.path, self.shards, self.index, self.sidecar = path, shards, index, sidecar
        self.layout = "field" if sidecar is None else "packed"
        self.shard_bytes = [shard.stat().st_size for shard in shards]
        self._starts = np.cumsum([0, *self.shard_bytes])
        order = np.argsort(offsets, kind="stable")
        self.keys, self.offsets = keys[order], offsets[order]
        repeated = np.flatnonzero(np.diff(self.offsets) == 0)
        if len(repeated):
            raise DataError(f"{index}: lists offset {self.offsets[repeated[0]]} more than once; make the index again")
        self.other_records = 0
        if sidecar is not None:
            self.num_classes = sidecar.num_classes
        else:
            self._keep_images()
        self.num_images = len(self.offsets)

    def _keep_images(self) -> None:
        """Of a field set: drop the records without an image, and find the number of classes."""
        headers = self._read_headers()
        others = np.flatnonzero(~headers.is_image)
        self.other_records = len(others)
        header = None
        if len(others) and self.keys[others[0]] == 0:
            header = RecordReader(self.shards[0]).read_at(int(self.offsets[others[0]]), 0).labels
        announced = announced_classes(header, len(others) - 1)
        self.keys, self.offsets, labels = self.keys[headers.is_image], self.offsets[headers.is_image], headers.labels[headers.is_image]
        if not len(labels):
            raise DataError(f"{self.path}: no image record among the {self.other_records} records that {self.index.name} lists")
        self.num_classes = min(int(np.nan_to_num(labels).max()) + 1, MAX_CLASSES) if announced is None else announced
        self.labels = self._checked(labels)

    def _read_headers(self) -> Headers:
        cuts = np.searchsorted(self.offsets, self._starts)
        cuts[-1] = len(self.offsets)  # an offset beyond the end is read, and refused, with the last shard
        parts = []
        for shard, start, low, high in zip(self.shards, self._starts, cuts, cuts[1:], strict=False):
            parts.append(read_headers(shard, self.keys[low:high], self.offsets[low:high] - start))
        return Headers(np.concatenate([part.labels for part in parts]), np.concatenate([part.is_image for part in parts]))

    def _checked(self, labels: np.ndarray) -> np.ndarray:
        bad = np.flatnonzero(~((labels >= 0) & (labels < self.num_classes) & (labels == np.floor(labels))))
        if len(bad):
            first = bad[0]
            raise DataError(
                f"{self.where(first)}: label {labels[first]:g}, expected a whole number in [0, {self.num_classes}); "
                f"{len(bad)} of {len(labels)} image records are like that: mend the labels, or take those records out of the index"
            )
        return labels.astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """[N] int64 in the order of ``offsets``. Read from the records of a packed set on first use (about a second per million)."""
        return self._checked(self._read_headers().labels)

    @cached_property
    def images_per_class(self) -> np.ndarray:
        """[C] int64."""
        if self.sidecar is not None:
            return np.array(self.sidecar.images_per_identity, np.int64)
        return np.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 that tells this set from another: of the sidecar (it holds every record's CRC), else of offsets and labels."""
        if self.sidecar is not None:
            return hashlib.sha256((self.path / SIDECAR_NAME).read_bytes()).hexdigest()
        return hashlib.sha256(self.offsets.tobytes() + self.labels.tobytes()).hexdigest()

    def where(self, i: int) -> str:
        """Names image record ``i`` for an error message: shard, offset in it, key."""
        shard = int(np.searchsorted(self._starts, self.offsets[i], side="right")) - 1
        return f"{self.shards[shard]}: record at offset {self.offsets[i] - self._starts[shard]} (key {self.keys[i]})"

    def write_reader_index(self, path: Path, keep: np.ndarray) -> list[Path]:
        """Write a DALI index of the image records where ``keep`` ([N] bool) is set; returns the shards that it spans, in order.

        DALI 2.4 finds the file of an offset by stepping at most one file ahead per record, and not at all at the last record. So
        shards without a kept record are left out of the list, and the last record stands twice: DALI skips the empty first copy.
        """
        kept = self.offsets[keep]
        counts = np.histogram(kept, bins=self._starts)[0]
        used = np.flatnonzero(counts)
        starts = np.cumsum([0, *(self.shard_bytes[shard] for shard in used)])[:-1]
        kept = kept + np.repeat(starts - self._starts[used], counts[used])
        with open(path, "w", encoding="ascii") as file:
            for start in range(0, len(kept), 1 << 20):
                file.writelines(f"{key}\t{offset}\n" for key, offset in enumerate(kept[start : start + (1 << 20)].tolist(), start))
            file.write(f"{len(kept)}\t{kept[-1]}\n")
        return [self.shards[shard] for shard in used]


class RecordNames:
    """Names the records of a set by where DALI found them.

    "/data/shard_00006.rec at index 5762928" -> "shard_00006.rec offset 5762928 (key 5123)". The set's index is read at the first
    question: some seconds for 40 M records, and 16 bytes of memory a record from then on, which most runs never need.
    """

    def __init__(self, faces: ShardSet) -> None:
        """Does not hold on to ``faces``."""
        self._index = faces.index
        self._starts = dict(zip(map(str, faces.shards), np.cumsum([0, *faces.shard_bytes[:-1]]).tolist(), strict=True))

    @cached_property
    def _by_offset(self) -> tuple[np.ndarray, np.ndarray]:
        keys, offsets = read_index(self._index)
        order = np.argsort(offsets, kind="stable")
        return keys[order], offsets[order]

    def __call__(self, places: Sequence[str]) -> list[str]:
        """Raises ``DataError`` when the index cannot be read (any more), or lists no record there."""
        keys, offsets = self._by_offset
        parts = [place.rpartition(" at index ") for place in places]
        wanted = np.array([self._starts[shard] + int(offset) for shard, _, offset in parts], np.int64)
        at = np.searchsorted(offsets, wanted).clip(max=len(offsets) - 1)
        strangers = np.flatnonzero(offsets[at] != wanted)
        if len(strangers):
            raise DataError(f"{self._index}: lists no record at {places[strangers[0]]}; it was changed since the set was opened")
        return [f"{Path(shard).name} offset {offset} (key {key})" for (shard, _, offset), key in zip(parts, keys[at], strict=True)]


def open_set(path: str | os.PathLike) -> ShardSet:
    """Open a packed set (its folder) or a field set (its folder, or the .rec file with the .idx beside it).

    Raises ``DataError`` when files are missing or empty, the shards' sizes or the index disagree with the sidecar, or (field set, whose
    labels are read here) a label is no whole number in [0, C). A packed set's labels are checked when ``labels`` is first used.
    """
    path = Path(path)
    if (path / SIDECAR_NAME).is_file():
        return _open_packed(path)
    rec, index = find_field_pair(path)
    keys, offsets = read_index(index)
    return ShardSet(path, [rec], index, None, keys, offsets)


def announced_classes(header: tuple[float, ...] | None, identity_records: int) -> int | None:
    """C of a field set by its header record (key 0, labels [N + 1, N + 1 + C]); None without one, or when it says nothing usable.

    The header is followed by one record per identity after the images. Their count is exact; float32 labels above 2^24 are not.
    """
    if header is None:
        return None
    if identity_records:
        return identity_records
    return int(header[1] - header[0]) if len(header) == 2 and header[0] < header[1] <= MAX_CLASSES else None


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
    keys, offsets = read_index(path / INDEX_NAME)
    if len(offsets) != sidecar.num_images:
        raise DataError(f"{path / INDEX_NAME}: lists {len(offsets)} records, the sidecar {sidecar.num_images}; pack the set again")
    end = sum(info.bytes for info in sidecar.shards)
    if offsets.max() >= end:
        raise DataError(f"{path / INDEX_NAME}: offset {offsets.max()} lies beyond the shards' {end} bytes; pack the set again")
    return ShardSet(path, shards, path / INDEX_NAME, sidecar, keys, offsets)


def find_field_pair(path: Path) -> tuple[Path, Path]:
    """The .rec and .idx of a field set at ``path``: the file itself, ``train.rec`` in the folder, or the only .rec there."""
    if path.is_file() and path.suffix == ".rec":
        rec = path
    elif path.is_dir():
        found = sorted(path.glob("*.rec"))
        rec = path / "train.rec" if path / "train.rec" in found else found[0] if len(found) == 1 else None
        if rec is None:
            what = f"{len(found)} .rec files ({', '.join(p.name for p in found[:3])}, ...) without a sidecar" if found else "no .rec file"
            raise DataError(f"{path}: expected {SIDECAR_NAME} (a packed set), train.rec or one .rec file; found {what}")
    else:
        found = "another file" if path.exists() else "nothing"
        raise DataError(f"{path}: expected a folder with a set of shards or a .rec file, found {found}")
    index = rec.with_suffix(".idx")
    if not rec.stat().st_size:
        raise DataError(f"{rec}: the file is empty")
    if not index.is_file():
        raise DataError(f"{index}: missing; a .rec file is read through its index (DALI's `rec2idx {rec.name} {index.name}` makes one)")
    return rec, index
