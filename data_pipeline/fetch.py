"""Reads image records by number and proves them before they are decoded."""

import errno
import os
import struct
import zlib

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.jpeg import image_problem
from data_pipeline.recordio import MAGIC, RecordReader
from data_pipeline.shard_set import ShardSet

_LEAD = struct.Struct("<IIIfQQ")  # magic, length word, flag, label, id, id2


class RecordFetcher:
    """The encoded images of a set's records, each compared with what the set's table says of it. Holds every shard open.

    Files are read by ``pread``, not mapped: one that is cut short under us is an error, not a signal that ends the process.
    """

    def __init__(self, faces: ShardSet) -> None:
        self._faces = faces
        self._has_checksums = faces.sidecar is not None
        self._files: list[int] = []  # descriptors of the shards
        for shard in faces.shards:
            try:
                self._files.append(os.open(shard, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                remedy = (
                    f"a loader opens all {len(faces.shards)} shards: raise `ulimit -n`" if error.errno == errno.EMFILE else "is it there?"
                )
                raise DataError(f"{shard}: cannot be opened ({error.strerror}); {remedy}") from error

    def will_need(self, numbers: np.ndarray) -> None:
        """Have the system read the records ([n] int64) ahead, in the background."""
        for file, offset, length, _, _ in zip(*self._columns(numbers), strict=True):
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)

    def fetch(self, numbers: np.ndarray) -> list[memoryview | DataError]:
        """Of every record ([n] int64) the encoded image, or what is wrong with it."""
        images: list[memoryview | DataError] = []
        for number, file, offset, length, label, crc32 in zip(numbers.tolist(), *self._columns(numbers), strict=True):
            try:
                data = os.pread(file, length, offset)
            except OSError as error:
                images.append(self._problem(number, f"cannot be read ({error.strerror})"))
                continue
            if len(data) < length:
                images.append(self._problem(number, f"{len(data)} bytes, the set's table says {length}: the file was cut short"))
                continue
            magic, word, flag, found, _, _ = _LEAD.unpack_from(data)
            if magic == MAGIC and flag == 0 and 24 <= word <= length - 8:  # one part, one label: nearly all are like that
                image = memoryview(data)[32 : 8 + word]
                # The checksum of a packed set tells that the image is the one that pack looked at.
                if found == label and (zlib.crc32(image) == crc32 if self._has_checksums else not image_problem(bytes(image))):
                    images.append(image)
                    continue
            images.append(self._prove(number, label, crc32))
        return images

    def _columns(self, numbers: np.ndarray) -> tuple[list[int], ...]:
        """File, offset in it, length, label and CRC32 of every record."""
        records = self._faces.records[numbers]
        shards, offsets = self._faces.places(records)
        files = [self._files[shard] for shard in shards.tolist()]
        return files, offsets.tolist(), records["length"].tolist(), records["label"].tolist(), records["crc32"].tolist()

    def _prove(self, number: int, label: int, crc32: int) -> memoryview | DataError:
        """The image of any record, looked at in every way, or what is wrong with it."""
        shard, offset, key = self._faces.place(number)
        try:
            record = RecordReader(self._faces.shards[shard]).read_at(offset, key)
        except (DataError, OSError) as error:
            return DataError(str(error))
        image, found = record.image, record.labels[0]
        if found != label:
            return self._problem(number, f"label {found:g}, the set's table says {label}")
        if self._has_checksums and (crc := zlib.crc32(image)) != crc32:
            return self._problem(number, f"CRC32 {crc:08x}, the set's table says {crc32:08x}: the image changed after packing")
        if problem := image_problem(image):
            return self._problem(number, problem)
        return memoryview(image)

    def _problem(self, number: int, problem: str) -> DataError:
        return DataError(f"{self._faces.where(number)}: {problem}")

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)
