"""What ``pack`` packs: folders of images, the field's record files, packed sets, or several of them one after the other."""

import hashlib
import itertools
import json
import mmap
import os
import sys
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.names import is_plain_name
from data_pipeline.record_table import MAX_CLASSES, AllBut
from data_pipeline.recordio import RecordReader
from data_pipeline.shard_set import SIDECAR_NAME, open_set

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SUFFIXES = tuple(map(os.fsencode, SUFFIXES))
_PATHS, _PATH_BOUNDS, _IDENTITY_BOUNDS, _IDENTITIES = "paths", "path_bounds", "identity_bounds", "identities.json"


class Source(ABC):
    """Images with labels, numbered from 0. Sent to another process it opens itself anew: what there is per image lies in mapped files.

    Attributes:
        num_classes: C; labels lie in [0, C).
        digest: hex; another one when images come, go or change hands, not when their bytes change: see ``changed``.
    """

    num_classes: int
    digest: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def identities(self) -> list[str]:
        """The names of the classes, [C]."""

    @abstractmethod
    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """[n] int64 of the images ``numbers`` ([n] int64)."""

    @abstractmethod
    def read(self, numbers: np.ndarray) -> Iterator[tuple[bytes | DataError, int]]:
        """One image after the other, as it is encoded, and when its file changed last: ns of its file system's clock, 0 when not known.

        In place of an image that cannot be read stands what is wrong; the message begins with ``where``.
        """

    @abstractmethod
    def where(self, number: int) -> str:
        """Names an image: its path, or its record."""

    @abstractmethod
    def changed(self, numbers: np.ndarray) -> int:
        """The latest of the times that ``read`` gives, without reading."""

    def read_one(self, number: int) -> bytes | DataError:
        return next(self.read(np.array([number])))[0]


def open_source(paths: Sequence[Path], wanted: Sequence[str] | None, scratch: Path, *, progress: bool = False) -> Source:
    """What ``paths`` hold together. ``wanted``: the identities to take of a single folder of images. ``scratch``: for lists of files.

    Raises ``DataError``: see ``pack.pack``.
    """
    if wanted is not None and (len(paths) > 1 or _is_record_set(paths[0])):
        raise DataError("--identities: chooses among the folders of one folder of images, not of record files or of several sources")
    sources: list[Source] = [
        RecordSource(path) if _is_record_set(path) else list_folder(path, wanted, scratch / f"source_{k}", progress=progress)
        for k, path in enumerate(paths)
    ]
    source = sources[0] if len(sources) == 1 else MergedSource(sources)
    _refuse_too_many(source.num_classes, ", ".join(map(str, paths)))
    return source


def _is_record_set(path: Path) -> bool:
    if path.is_file() or (path / SIDECAR_NAME).is_file():
        return True
    return path.is_dir() and any(entry.name.endswith(".rec") for entry in os.scandir(path))


def _refuse_too_many(num_classes: int, shown: object) -> None:
    if num_classes > MAX_CLASSES:
        raise DataError(f"{shown}: {num_classes} identities; labels are float32 in the records, which counts to {MAX_CLASSES}")


class FolderSource(Source):
    """``root/<identity>/<image>``, as ``list_folder`` found it."""

    def __init__(self, root: Path, listing: Path, digest: str) -> None:
        self._root, self._listing, self.digest = root, listing, digest
        with open(listing / _PATHS, "rb") as paths:
            self._paths = mmap.mmap(paths.fileno(), 0, access=mmap.ACCESS_READ)
        # As plain arrays: indexing a memmap takes several times as long.
        self._path_bounds = np.memmap(listing / _PATH_BOUNDS, np.int64, "r").view(np.ndarray)
        self._identity_bounds = np.memmap(listing / _IDENTITY_BOUNDS, np.int64, "r").view(np.ndarray)
        self.num_classes = len(self._identity_bounds) - 1

    def __reduce__(self) -> tuple:
        return FolderSource, (self._root, self._listing, self.digest)

    def __len__(self) -> int:
        return len(self._path_bounds) - 1

    def identities(self) -> list[str]:
        return json.loads((self._listing / _IDENTITIES).read_text())

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        return self._identity_bounds.searchsorted(numbers, "right") - 1

    def read(self, numbers: np.ndarray) -> Iterator[tuple[bytes | DataError, int]]:
        return map(_read_file, self._full_paths(numbers))

    def where(self, number: int) -> str:
        (path,) = self._full_paths(np.array([number]))
        return os.fsdecode(path)

    def changed(self, numbers: np.ndarray) -> int:
        return max(map(_change_time, self._full_paths(numbers)), default=0)

    def _full_paths(self, numbers: np.ndarray) -> Iterator[bytes]:
        root, starts, stops = os.fsencode(self._root) + b"/", self._path_bounds[numbers], self._path_bounds[numbers + 1]
        return (root + self._paths[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))


def _read_file(path: bytes) -> tuple[bytes | DataError, int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a third of the time that a file object takes
        try:
            status = os.fstat(descriptor)
            data = os.read(descriptor, status.st_size)
            while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
                data += more
            return data, status.st_ctime_ns  # not the time of modification, which a copy may bring along
        finally:
            os.close(descriptor)
    except OSError as error:
        return DataError(f"{os.fsdecode(path)}: cannot be read ({error.strerror})"), _change_time(path)


def _change_time(path: bytes) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:
        return 0


def list_folder(root: Path, wanted: Sequence[str] | None, listing: Path, *, progress: bool = False) -> FolderSource:
    """Find the images of ``root/<identity>/<image>``. Labels are the places of the identities' names in sorted order.

    ``wanted``: the identities to take; None: every folder. What begins with a dot is left out. ``listing``: a folder to write; it holds
    the images' paths and, as int64, where the path of each and the images of each identity begin (and the last ends).
    Raises ``DataError``: see ``pack.pack``.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one folder per identity in it")
    identities = _identity_folders(root, wanted)
    _refuse_too_many(len(identities), root)
    listing.mkdir(exist_ok=True)
    prefix, digest, end, count, stranger = os.fsencode(root), hashlib.sha256(), 0, 0, None
    with (
        open(listing / _PATHS, "wb") as paths,
        open(listing / _PATH_BOUNDS, "wb") as path_bounds,
        open(listing / _IDENTITY_BOUNDS, "wb") as identity_bounds,
    ):
        array("q", [0]).tofile(path_bounds)
        array("q", [0]).tofile(identity_bounds)
        for identity in tqdm(identities, "list", unit="id", file=sys.stderr, disable=not progress):
            name = os.fsencode(identity)
            entries = sorted(entry for entry in os.listdir(os.path.join(prefix, name)) if not entry.startswith(b"."))
            images = [name + b"/" + entry for entry in entries if entry.lower().endswith(_SUFFIXES)]
            if len(images) < len(entries) and stranger is None:
                stranger = root / identity / os.fsdecode(next(entry for entry in entries if not entry.lower().endswith(_SUFFIXES)))
            bounds = array("q", itertools.accumulate(map(len, images), initial=end))
            end, count = bounds[-1], count + len(images)
            paths.writelines(images)
            bounds[1:].tofile(path_bounds)
            array("q", [count]).tofile(identity_bounds)
            digest.update(b"".join([*images, bounds.tobytes()]))
    empty = np.flatnonzero(np.diff(np.fromfile(listing / _IDENTITY_BOUNDS, np.int64)) == 0)
    if not count:
        raise DataError(f"{root}: no images; expected {root}/<identity>/<image>, with names in {', '.join(SUFFIXES)}")
    if len(empty):
        raise DataError(
            f"{root}: {len(empty)} of {len(identities)} identities have no image, the first: {identities[empty[0]]!r}; fill or delete them"
        )
    if stranger and progress:
        print(f"ignored entries that are no images, the first: {stranger}", file=sys.stderr)
    (listing / _IDENTITIES).write_text(json.dumps(identities))
    return FolderSource(root, listing, digest.hexdigest())


def _identity_folders(root: Path, wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    names = sorted(set(wanted))
    missing = [name for name in names if not (root / name).is_dir()]
    if missing:
        raise DataError(f"{root}: {len(missing)} of {len(names)} listed identities have no folder here, the first: {missing[0]!r}")
    return names


class RecordSource(Source):
    """The image records of a set (``shard_set.open_set``): the field's .rec and .idx, or a packed one. Those in quarantine stay out.

    Of several labels in a record the first counts.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.faces = path, open_set(path)
        self.digest, self.num_classes = self.faces.digest, self.faces.num_classes
        self._numbers = AllBut(self.faces.excluded)
        self._reader = lru_cache(512)(lambda shard: RecordReader(self.faces.shards[shard]))  # fewer than the files one may have open

    def __reduce__(self) -> tuple:
        return RecordSource, (self.path,)

    def __len__(self) -> int:
        return self.faces.num_images - len(self.faces.excluded)

    def identities(self) -> list[str]:
        """Of a field set the folders that a ``.lst`` beside it names (``read_list``), without one the labels."""
        listed = self.faces.shards[0].with_suffix(".lst")
        if self.faces.layout == "field" and listed.is_file():
            return read_list(listed, self.faces.images_per_class)
        return self.faces.identities()

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        return self.faces.labels[self._numbers[numbers]].astype(np.int64)

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """The records' numbers in the index, [n] int64."""
        return self.faces.records["key"][self._numbers[numbers]].astype(np.int64)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[bytes | DataError, int]]:
        """As ``Source.read``; a packed set's image is compared with its checksum."""
        changed = self.changed(numbers)
        records = self.faces.records[self._numbers[numbers]]
        shards, offsets = self.faces.places(records)
        columns = (shards, offsets, records["length"], records["key"], records["crc32"])
        return ((self._read(*place), changed) for place in zip(*(column.tolist() for column in columns), strict=True))

    def _read(self, shard: int, offset: int, length: int, key: int, crc32: int) -> bytes | DataError:
        try:
            image = self._reader(shard).read_image(offset, key, length)
        except (DataError, OSError) as error:
            return DataError(str(error))
        if self.faces.sidecar is not None and (found := zlib.crc32(image)) != crc32:
            where = f"{self.faces.shards[shard]}: record at offset {offset} (key {key})"
            return DataError(f"{where}: CRC32 {found:08x}, the set's table says {crc32:08x}: the image changed after packing")
        return image

    def where(self, number: int) -> str:
        return self.faces.where(int(self._numbers[number]))

    def changed(self, numbers: np.ndarray) -> int:
        return max(shard.stat().st_ctime_ns for shard in self.faces.shards)


class MergedSource(Source):
    """Several sources, one after the other. The labels of each begin where those of the one before it end; no identities are united.

    The identities of source k, from 0, are named ``s<k>_<name>``.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._starts = np.cumsum([0, *map(len, sources)])
        self._first_labels = np.cumsum([0, *(source.num_classes for source in sources)])
        self.num_classes = int(self._first_labels[-1])
        self.digest = hashlib.sha256(" ".join(source.digest for source in sources).encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return MergedSource, (self._sources,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def identities(self) -> list[str]:
        width = len(str(len(self._sources) - 1))
        return [f"s{k:0{width}d}_{name}" for k, source in enumerate(self._sources) for name in source.identities()]

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        labels = np.empty(len(numbers), np.int64)
        for k, mine in self._parts(numbers):
            labels[mine] = self._first_labels[k] + self._sources[k].labels(numbers[mine] - self._starts[k])
        return labels

    def read(self, numbers: np.ndarray) -> Iterator[tuple[bytes | DataError, int]]:
        readers = {k: self._sources[k].read(numbers[mine] - self._starts[k]) for k, mine in self._parts(numbers)}
        return (next(readers[k]) for k in self._owners(numbers).tolist())

    def where(self, number: int) -> str:
        (k,) = self._owners(np.array([number]))
        return self._sources[k].where(number - int(self._starts[k]))

    def changed(self, numbers: np.ndarray) -> int:
        return max((self._sources[k].changed(numbers[mine] - self._starts[k]) for k, mine in self._parts(numbers)), default=0)

    def _owners(self, numbers: np.ndarray) -> np.ndarray:
        return self._starts.searchsorted(numbers, "right") - 1

    def _parts(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(k, which of the numbers are of source k: [n] bool) of every source that has any."""
        owners = self._owners(numbers)
        for k in np.unique(owners).tolist():
            yield k, owners == k


def read_list(path: Path, images_per_class: np.ndarray) -> list[str]:
    """The names of the classes by a ``.lst``. Its lines have tabs: key, label, path (im2rec), or aligned, path, label (InsightFace).

    An image's folder is its identity. A class without images ([C] counts) may lack a line, its label is its name then. Raises
    ``DataError`` for other lines, a class with two folders, one with images but without a line, a folder of two classes.
    """
    num_classes = len(images_per_class)
    names: list[str | None] = [None] * num_classes
    for number, (label, image) in enumerate(_list_lines(path), 1):
        name = image.rpartition("/")[0].rpartition("/")[2]
        if not 0 <= label < num_classes or not name:
            raise DataError(
                f"{path}: line {number}: label {label} and folder {name!r}, expected a label in [0, {num_classes}) and a folder"
            )
        if names[label] not in (None, name):
            raise DataError(f"{path}: line {number}: label {label} is {name!r}, but {names[label]!r} before; mend or remove the list")
        names[label] = name
    known: set[str] = set()
    for label, name in enumerate(names):
        if name is None and images_per_class[label]:
            raise DataError(f"{path}: no line of label {label}, which has {images_per_class[label]} images; mend or remove the list")
        names[label] = name = str(label) if name is None else name
        if name in known:
            raise DataError(f"{path}: {name!r} is the folder of several labels; mend or remove the list")
        known.add(name)
    return names


def _list_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(label, image path) of every line."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\n").split("\t")
            try:
                by_path_last = len(fields) < 3 or "/" not in fields[1]
                label, image = (float(fields[1]), fields[-1]) if by_path_last else (float(fields[2]), fields[1])
                if not label.is_integer():
                    raise ValueError("no class")
            except (ValueError, IndexError) as error:
                raise DataError(f"{path}: line {number}: expected key, label and path separated by tabs, found {line[:80]!r}") from error
            yield int(label), image


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
    if unsafe := [name for name in content if not is_plain_name(name)]:
        raise DataError(f"{path}: {unsafe[0]!r} is no plain folder name")
    return content
