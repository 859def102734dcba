"""Writes the images of a set of records as files, in a folder per identity: what ``pack`` was given."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.jpeg import image_suffix
from data_pipeline.names import is_plain_name
from data_pipeline.output import new_folder
from data_pipeline.sources import RecordSource
from data_pipeline.workers import Count, choose_workers, run_to_end

_OWNED = re.compile(r"(?!)")  # no name: an existing folder is never replaced
_BLOCK = 512


@dataclass(frozen=True)
class Unpacked:
    """What ``unpack`` wrote, and what it left out."""

    images: int
    identities: int  # with a folder
    empty_identities: int  # without an image, and so without a folder
    quarantined: int  # records


def unpack(path: Path, out: Path, *, workers: int | None = None, progress: bool = False) -> Unpacked:
    """Write ``<out>/<identity>/<key>.jpg`` (or .png) for every image of the set at ``path``, byte for byte as it is stored.

    Identities have the names of ``RecordSource.identities``; keys have eight digits or more. Records in quarantine are left out. ``pack``
    of ``out`` gives the same images under the same identities; labels are the same where every identity has an image and the names are
    in sorted order, as ``pack`` of a folder leaves them. ``workers``: None: one per core. ``out`` is complete or absent.

    Raises DataError: an ``out`` that exists, a damaged record, an image that is neither JPEG nor PNG, a name that is no folder's.
    """
    source = RecordSource(path)
    names = source.identities()
    _check_names(path, names)
    has_images = source.faces.images_per_class > 0
    workers = choose_workers(workers, len(source))
    with new_folder(out, _OWNED) as folder, tqdm(total=len(source), unit="img", file=sys.stderr, disable=not progress) as bar:
        for label in np.flatnonzero(has_images).tolist():
            (folder / names[label]).mkdir()
        job = _Unpacker(source, names, folder, max(_BLOCK, -(-len(source) // 1024)))
        run_to_end(job, range(0, len(source), job.length), workers, bar.update)
    quarantine = source.faces.quarantine
    left_out = 0 if quarantine is None else len(set(quarantine.places))
    return Unpacked(len(source), int(has_images.sum()), int((~has_images).sum()), left_out)


def _check_names(path: Path, names: Sequence[str]) -> None:
    known: set[str] = set()
    for name in names:
        if not is_plain_name(name) or name.startswith("."):
            raise DataError(f"{path}: has an identity {name!r}, which is no plain folder name; mend the list of names")
        if name in known:
            raise DataError(f"{path}: has two identities {name!r}, which cannot share a folder; mend the list of names")
        known.add(name)


@dataclass(frozen=True)
class _Unpacker:
    """Writes ``length`` images from one on: the job of a worker."""

    source: RecordSource
    names: list[str]
    folder: Path
    length: int

    def __call__(self, start: int, count: Count) -> None:
        stop = min(start + self.length, len(self.source))
        for low in range(start, stop, _BLOCK):
            numbers = np.arange(low, min(low + _BLOCK, stop))
            labels, keys = self.source.labels(numbers).tolist(), self.source.keys(numbers).tolist()
            for number, label, key, (image, _) in zip(numbers.tolist(), labels, keys, self.source.read(numbers), strict=True):
                if isinstance(image, DataError):
                    raise DataError(f"{image}; `python -m data_pipeline verify {self.source.path}` puts such records in quarantine")
                suffix = image_suffix(image)
                if suffix is None:
                    raise DataError(f"{self.source.where(number)}: starts with {image[:4].hex()!r}, which is neither JPEG nor PNG")
                _write(self.folder / self.names[label] / f"{key:08d}{suffix}", image)
            count(len(numbers))


def _write(path: Path, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        raise DataError(f"{path}: another record of this identity has the same key; make the index again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error
