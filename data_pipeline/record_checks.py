"""Checks records, thousands at a time: framing, labels, checksums, and the images, decoded strictly."""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline import SIDE
from data_pipeline.errors import DataError
from data_pipeline.jpeg import SCAN, frame_sizes, image_problem
from data_pipeline.recordio import FIRST, MAGIC, MAX_LENGTH, WHOLE, Record, RecordReader
from data_pipeline.workers import Count

UNREAD, IMAGE, OTHER = 0, 1, 2  # kinds of records: damaged beyond reading, an image, labels alone
_WINDOW = 4 << 20  # bytes of a shard in memory at a time: they stay in the processor's cache until their checksums are taken
_LEAD = 32  # bytes before a record's labels and image: magic, length word, flag, label, id, id2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. As text: "/data/shard_00006.rec: record at offset 5762928 (key 5123): what"."""

    shard: Path  # or another file of the set
    problem: str
    offset: int | None = None  # of a record in the shard; None: the finding is of the file
    key: int | None = None  # None: no index names the record
    unfit: bool = False  # the record must not be trained on, and the set can do without it

    def __str__(self) -> str:
        key = "" if self.key is None else f" (key {self.key})"
        return f"{self.shard}: " + ("" if self.offset is None else f"record at offset {self.offset}{key}: ") + self.problem


@dataclass(frozen=True)
class Block:
    """Records of a shard, sorted by offset, and what is said of them elsewhere. The columns are [n] int64."""

    shard: Path
    first: int  # number of the first of them in the set
    offsets: np.ndarray
    lengths: np.ndarray  # in bytes; of a field set up to the next record in the index, or the end of the file
    keys: np.ndarray
    labels: np.ndarray | None = None  # by the table of a packed set
    crc32: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True)
class Checked:
    """What was found in a block."""

    first: int
    kinds: np.ndarray  # [n] int8
    labels: np.ndarray  # [n] float32 as stored, the first of each image record; else 0
    findings: list[Finding]


class Checker:
    """Checks blocks: the job of a worker. ``decode``: images, too."""

    def __init__(self, decode: bool) -> None:
        self._decode = decode
        self._reader: RecordReader | None = None  # of the shard that was read last

    def __call__(self, block: Block, count: Count) -> Checked:
        if self._reader is None or self._reader.path != block.shard:
            self._reader = RecordReader(block.shard)
        checked = Checked(block.first, np.zeros(len(block), np.int8), np.zeros(len(block), np.float32), [])
        ends, start = block.offsets + block.lengths, 0
        while start < len(block):
            stop = max(start + 1, int(ends.searchsorted(block.offsets[start] + _WINDOW, "right")))
            self._check_window(block, start, stop, checked)
            count(stop - start)
            start = stop
        return checked

    def _check_window(self, block: Block, start: int, stop: int, checked: Checked) -> None:
        """Find the records that are right at a glance, and look at the others one by one."""
        window = slice(start, stop)
        begin, lengths = int(block.offsets[start]), block.lengths[window]
        try:
            data = self._reader.read_bytes(begin, min(int(block.offsets[stop - 1] + lengths[-1]) - begin, _WINDOW))
        except OSError:  # the look at each says at which
            data = b""
        seen = _look(data, block.offsets[window] - begin)
        sound = seen.sound & (seen.lengths <= lengths)
        images = np.flatnonzero(sound & seen.is_image)
        spans = list(zip(seen.image_starts[images].tolist(), seen.image_ends[images].tolist(), strict=True))
        encoded = [memoryview(data)[a:b] for a, b in spans]
        sound[images] &= np.fromiter((data.find(SCAN, a, b) >= 0 for a, b in spans), bool, len(images))
        if block.labels is not None:
            sound &= seen.is_image & (seen.lengths == lengths) & (seen.labels == block.labels[window])
            sound[images] &= np.fromiter(map(zlib.crc32, encoded), np.int64, len(images)) == block.crc32[window][images]
        if self._decode:
            sound[images] &= np.fromiter((_decode_problem(image) is None for image in encoded), bool, len(images))
        checked.kinds[window] = np.where(seen.is_image, IMAGE, OTHER)
        checked.labels[window] = np.where(seen.is_image, seen.labels, 0)
        for i in np.flatnonzero(~sound).tolist():
            checked.findings.extend(self._examine(block, start + i, checked))
        for i in np.flatnonzero(sound & (seen.lengths < lengths)).tolist():
            checked.findings.append(self._gap(block, start + i, int(block.offsets[start + i] + seen.lengths[i])))

    def _examine(self, block: Block, i: int, checked: Checked) -> Iterator[Finding]:
        """What is wrong with a record, which may be nothing: it may be in several parts, for example."""
        offset, key, next_offset = int(block.offsets[i]), int(block.keys[i]), int(block.offsets[i] + block.lengths[i])
        checked.kinds[i], checked.labels[i] = UNREAD, 0
        try:
            record = self._reader.read_at(offset, key)
        except DataError as error:
            yield Finding(block.shard, str(error).removeprefix(f"{Finding(block.shard, '', offset, key)}"), offset, key, unfit=True)
            return
        except OSError as error:
            yield Finding(block.shard, f"cannot be read ({error.strerror})", offset, key, unfit=True)
            return
        if record.is_image:
            checked.kinds[i], checked.labels[i] = IMAGE, record.labels[0]
        else:
            checked.kinds[i] = OTHER
        problems = list(self._problems(block, i, record, next_offset))
        for problem in problems:
            yield Finding(block.shard, problem, offset, key, unfit=True)
        if block.labels is None and record.end < next_offset and not problems:  # else its length may be wrong
            yield self._gap(block, i, record.end)

    def _gap(self, block: Block, i: int, end: int) -> Finding:
        """``end``: of record i of a field set."""
        problem = gap_problem(self._reader, end, int(block.offsets[i] + block.lengths[i]), "after")
        return Finding(block.shard, problem, int(block.offsets[i]), int(block.keys[i]))

    def _problems(self, block: Block, i: int, record: Record, next_offset: int) -> Iterator[str]:
        if block.labels is not None:
            if record.end != next_offset:
                yield f"ends at byte {record.end}, the set's table says {next_offset}"
            if record.labels[0] != block.labels[i]:
                yield f"label {record.labels[0]:g}, the set's table says {block.labels[i]}"
            if (crc32 := zlib.crc32(record.image)) != block.crc32[i]:
                yield f"CRC32 {crc32:08x}, the set's table says {block.crc32[i]:08x}: the image changed after packing"
        elif record.end > next_offset and starts_record(self._reader, next_offset):
            yield f"ends at byte {record.end}, but the next record starts at {next_offset}: its length is damaged"
        if record.is_image or block.labels is not None:
            problem = image_problem(record.image) or (_decode_problem(record.image) if self._decode else None)
            if problem:
                yield problem


def gap_problem(reader: RecordReader, begin: int, end: int, where: str) -> str:
    """What to say of the bytes ``where`` ("before", "after") a record that belong to none."""
    if starts_record(reader, begin):
        return f"bytes {begin} to {end} {where} it hold a record that the index does not list: make the index again"
    return f"bytes {begin} to {end} {where} it belong to no record"


def starts_record(reader: RecordReader, at: int) -> bool:
    head = reader.read_bytes(at, 8)
    return len(head) == 8 and int.from_bytes(head[:4], "little") == MAGIC and head[7] >> 5 in (WHOLE, FIRST)


@dataclass(frozen=True)
class _Seen:
    """What records say at a glance. The columns are [n]; they mean something where ``sound`` is set."""

    sound: np.ndarray  # bool: of one part, all there; an image has a JPEG's start and end, and a frame header of the right size
    lengths: np.ndarray  # int64, framing and padding included
    is_image: np.ndarray  # bool
    labels: np.ndarray  # float32, the first of each
    image_starts: np.ndarray  # int64
    image_ends: np.ndarray  # int64


def _look(data: bytes, at: np.ndarray) -> _Seen:
    """Look at the records at ``at`` ([n] int64) of ``data``."""
    if len(data) < _LEAD + 4:
        data = bytes(_LEAD + 4)
    words, octets = np.frombuffer(data, "<u4", len(data) // 4), np.frombuffer(data, np.uint8)
    room = (at % 4 == 0) & (at + _LEAD + 4 <= len(data))
    first = np.where(room, at, 0) // 4
    magic, word, flag = (words[first + i] for i in range(3))
    labels = np.where(flag > 0, words[first + _LEAD // 4], words[first + 3]).view(np.float32)
    length = (word & MAX_LENGTH).astype(np.int64)
    starts, ends = at + _LEAD + 4 * flag.astype(np.int64), at + 8 + length
    whole = room & (magic == MAGIC) & (word >> 29 == WHOLE) & (starts <= ends) & (ends <= len(data))
    is_image = whole & ((flag == 0) | (starts < ends))
    jpeg = is_image & (starts + 4 <= ends)
    start, end = np.where(jpeg, starts, 0), np.where(jpeg, ends, 4)
    jpeg &= (words[start // 4] & 0xFFFFFF == 0xFFD8FF) & (octets[end - 2] == 0xFF) & (octets[end - 1] == 0xD9)
    jpeg[jpeg] = (frame_sizes(octets, starts[jpeg], ends[jpeg]) == SIDE).all(axis=1)
    return _Seen(whole & (jpeg | ~is_image), 8 + length + -length % 4, is_image, labels, starts, ends)


def _decode_problem(image: bytes | memoryview) -> str | None:
    """Decode an image whose start is sound. Grey is enough: libjpeg decodes the codes of all components, and only those can be wrong."""
    try:
        if image[:2] == b"\xff\xd8":
            simplejpeg.decode_jpeg(image, "GRAY", strict=True)  # strict: what libjpeg merely warns of is an error
        else:
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        return f"cannot be decoded ({error})"
    return None
