"""MXNet RecordIO image files: reader, writer, index, and a fast scan of record headers.

A file is a chain of parts. A part is ``magic uint32 | cflag (3 bits) and length (29 bits) uint32 | body | zero padding to 4 bytes``,
little-endian. A record is one part (cflag 0), or parts with cflag 1, 2, ..., 2, 3 whose bodies are joined with the 4 magic bytes between
them: a writer cuts the payload wherever those bytes stand at a multiple of 4, so that an aligned magic always starts a part.

The payload is ``flag uint32 | label float32 | id uint64 | id2 uint64``, then ``flag`` float32 labels (when flag > 0 the label field is
unused), then the encoded image. Records without an image exist: the field's files begin with a header record of labels
``[N + 1, N + 1 + identities]`` and end with one record per identity. A text index holds a ``key<TAB>offset`` line per record.

DALI's ``fn.readers.mxnet`` joins parts the same way, and takes the first 24 payload bytes from the first part unseen: it misreads a
record with the magic inside those 24 bytes. That needs an id of 3,470,205,706 or a label of -1.8e9, which ``RecordWriter`` refuses.
"""

import os
import struct
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from data_pipeline.errors import DataError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LEAD = struct.Struct("<III")  # magic, length word, flag
_BUFFER = 1 << 20
MAX_LENGTH = (1 << 29) - 1
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3  # the continuation flag


@dataclass(frozen=True)
class Record:
    """One record. ``key``: its number in the index, or its own ``id`` field when it was read without an index."""

    key: int
    labels: tuple[float, ...]
    payload: bytes  # everything: header, labels, image; multi-part records joined
    flag: int  # number of labels after the header; 0: the one label is in the header
    id: int
    id2: int
    offset: int  # of the first part, in bytes from the start of the file
    end: int  # first byte after the last part's padding

    @property
    def image(self) -> bytes:
        """The encoded image, empty in records that hold labels alone."""
        return self.payload[_HEADER.size + 4 * self.flag :]

    @property
    def is_image(self) -> bool:
        """False for the header record and the identity records of the field's layout, which hold labels alone."""
        return self.flag == 0 or len(self.payload) > _HEADER.size + 4 * self.flag


def encode_payload(labels: float | Sequence[float], image: bytes, *, id: int = 0, id2: int = 0) -> bytes:
    """The bytes of a record. One number becomes the header's label (flag 0); a sequence of n numbers, n float32 after it (flag n)."""
    if isinstance(labels, Sequence):
        if not labels:
            raise DataError("a record needs at least one label, got an empty sequence")
        return _HEADER.pack(len(labels), 0.0, id, id2) + struct.pack(f"<{len(labels)}f", *labels) + image
    return _HEADER.pack(0, labels, id, id2) + image


class RecordWriter:
    """Writes a .rec file and, when ``index_path`` is given, its index. Use it as a context manager; existing files are replaced.

    ``base`` is added to every offset in the index: the size of the shards before this one when the index spans several.
    """

    def __init__(self, path: str | os.PathLike, index_path: str | os.PathLike | None = None, *, base: int = 0) -> None:
        self.path = Path(path)
        self._file = open(self.path, "wb", buffering=_BUFFER)  # noqa: SIM115 - closed by close()
        self._index = None if index_path is None else open(index_path, "w", encoding="ascii")  # noqa: SIM115
        self._base = base
        self.position = 0  # bytes written so far

    def write(self, key: int, labels: float | Sequence[float], image: bytes, *, id2: int = 0) -> int:
        """Append one record (labels as in ``encode_payload``, the id field is ``key``); returns its offset in this file."""
        return self.write_payload(key, encode_payload(labels, image, id=key, id2=id2))

    def write_payload(self, key: int, payload: bytes) -> int:
        """Append one encoded record; returns its offset in this file."""
        if len(payload) > MAX_LENGTH:
            raise DataError(f"{self.path}: record {key}: {len(payload)} bytes, the format ends at {MAX_LENGTH}")
        cuts = _aligned_magic(payload)
        if cuts and cuts[0] < _HEADER.size:
            raise DataError(f"{self.path}: record {key}: the format's magic number stands in its label or id, which DALI cannot read")
        offset = self.position
        if not cuts:
            self._write_part(WHOLE, payload)
        else:
            bodies = [payload[start:stop] for start, stop in zip([0, *(cut + 4 for cut in cuts)], [*cuts, len(payload)], strict=True)]
            for body, cflag in zip(bodies, (FIRST, *[MIDDLE] * (len(cuts) - 1), LAST), strict=True):
                self._write_part(cflag, body)
        if self._index is not None:
            self._index.write(f"{key}\t{self._base + offset}\n")
        return offset

    def _write_part(self, cflag: int, body: bytes) -> None:
        padding = -len(body) % 4
        self._file.write(_PART.pack(MAGIC, cflag << 29 | len(body)))
        self._file.write(body)
        self._file.write(bytes(padding))
        self.position += _PART.size + len(body) + padding

    def close(self) -> None:
        """Write everything to the disk (fsync) and close; closing twice is fine."""
        for file in (self._file, self._index):
            if file is not None and not file.closed:
                with file:  # closes it even when the disk is full
                    file.flush()
                    os.fsync(file.fileno())

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _aligned_magic(payload: bytes) -> list[int]:
    """Offsets in ``payload``, multiples of 4, where the magic bytes stand."""
    found = np.frombuffer(payload, "<u4", len(payload) // 4) == MAGIC
    return (4 * np.flatnonzero(found)).tolist() if np.count_nonzero(found) else []


class RecordReader:
    """Iterates over ``Record``s: in the index's order when one is given, else in file order. Every record is yielded, image or not.

    Iterate as often as you like, ``read_at`` reads one record; both raise ``DataError`` with file, offset and key of a record that is
    cut short, has a wrong magic number, or starts in the middle of a multi-part record.
    """

    def __init__(self, path: str | os.PathLike, index_path: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such record file")
        self.size = self.path.stat().st_size
        self._file = open(self.path, "rb")  # noqa: SIM115 - closed when the reader is collected
        weakref.finalize(self, self._file.close)
        self.index = None if index_path is None else read_index(index_path)

    def __iter__(self) -> Iterator[Record]:
        if self.index is not None:
            for key, offset in zip(*(column.tolist() for column in self.index), strict=True):
                yield self.read_at(offset, key)
            return
        offset = 0
        while offset < self.size:
            record = self.read_at(offset)
            yield record
            offset = record.end

    def read_at(self, offset: int, key: int | None = None) -> Record:
        """The record that starts at byte ``offset``; ``key`` is what the record and the errors call it."""
        where = f"{self.path}: record at offset {offset}" + ("" if key is None else f" (key {key})")
        bodies, at, expected = [], offset, (WHOLE, FIRST)
        while True:
            cflag, body = self._read_part(at, where)
            if cflag not in expected:
                raise DataError(
                    f"{where}: continuation flag {cflag} at byte {at}, expected {' or '.join(map(str, expected))}: "
                    "the index points into a multi-part record, or the file is damaged"
                )
            bodies.append(body)
            at += _PART.size + len(body) + -len(body) % 4
            if cflag in (WHOLE, LAST):
                break
            expected = (MIDDLE, LAST)
        return _decode(_MAGIC_BYTES.join(bodies), where, key, offset, at)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """What stands there; less where the file ends."""
        return os.pread(self._file.fileno(), length, offset)

    def read_image(self, offset: int, key: int, length: int) -> bytes:
        """The image of the record at ``offset``, known to be ``length`` bytes long in the file. As by ``read_at``, in less time."""
        data = self.read_bytes(offset, length)
        if len(data) == length >= _LEAD.size:
            magic, word, flag = _LEAD.unpack_from(data)
            start, end = _PART.size + _HEADER.size + 4 * flag, _PART.size + (word & MAX_LENGTH)
            if magic == MAGIC and word >> 29 == WHOLE and start <= end <= length:
                return data[start:end]
        return self.read_at(offset, key).image  # in several parts, or damaged

    def _read_part(self, at: int, where: str) -> tuple[int, bytes]:
        if not 0 <= at < self.size:
            raise DataError(f"{where}: nothing at byte {at}, the file ends at {self.size}; it is cut short, or the index is another file's")
        self._file.seek(at)
        head = self._file.read(_PART.size)
        if len(head) < _PART.size:
            raise DataError(f"{where}: cut short, {len(head)} of {_PART.size} bytes of the part at byte {at}; copy the file again")
        magic, word = _PART.unpack(head)
        if magic != MAGIC:
            raise DataError(
                f"{where}: magic number 0x{magic:08x} at byte {at}, expected 0x{MAGIC:08x}: "
                "the index is another file's, or the file is damaged"
            )
        cflag, length = word >> 29, word & MAX_LENGTH
        body = self._file.read(length)
        if len(body) < length:
            raise DataError(f"{where}: cut short, {len(body)} of {length} bytes of the part at byte {at}; copy the file again")
        return cflag, body


def _decode(payload: bytes, where: str, key: int | None, offset: int, end: int) -> Record:
    if len(payload) < _HEADER.size:
        raise DataError(f"{where}: {len(payload)} bytes, less than the {_HEADER.size} of an image record's header")
    flag, label, id_, id2 = _HEADER.unpack_from(payload)
    if _HEADER.size + 4 * flag > len(payload):
        raise DataError(f"{where}: announces {flag} labels, but holds {len(payload)} bytes; the record is damaged")
    labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
    return Record(id_ if key is None else key, labels, payload, flag, id_, id2, offset, end)


def read_index(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets, [N] int64 each, in the order of the lines. DALI would end at the first bad line in silence; this raises."""
    keys, offsets = zip(*index_blocks(path), strict=True)
    return np.concatenate(keys), np.concatenate(offsets)


def index_blocks(path: str | os.PathLike, size: int = 1 << 24) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What ``read_index`` returns, in pieces of about ``size`` bytes of text."""
    path, number, empty = Path(path), 1, True
    try:
        with open(path, "rb") as file:
            while lines := file.read(size) + file.readline():
                if lines.strip():
                    empty = False
                    yield _index_columns(path, lines, number)
                number += lines.count(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot read the index: {error.strerror}") from error
    if empty:
        raise DataError(f"{path}: the index is empty; make it again (DALI's `rec2idx FILE.rec FILE.idx` does)")


def _index_columns(path: Path, lines: bytes, first: int) -> tuple[np.ndarray, np.ndarray]:
    """``first``: the number of the first line, for errors."""
    text = lines.decode("ascii", errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how numpy reports text that is no number
            flat = np.fromstring(text, np.int64, sep=" ")
        sound = flat.size == 2 * (text.strip().count("\n") + 1) and bool((flat >= 0).all())
    except (ValueError, DeprecationWarning):
        sound = False
    if not sound:
        for number, line in enumerate(text.splitlines(), first):
            fields = line.split()
            if len(fields) != 2 or not all(field.isdecimal() for field in fields):
                raise DataError(f"{path}: line {number}: expected `key<TAB>offset`, two whole numbers, found {line[:60]!r}")
        raise DataError(f"{path}: a key or an offset does not fit 63 bits; make the index again")
    return flat[0::2], flat[1::2]


@dataclass(frozen=True)
class Headers:
    """What the first bytes of N records say."""

    labels: np.ndarray  # [N] float32, the first of each
    is_image: np.ndarray  # [N] bool
    lengths: np.ndarray  # [N] int64, bytes in the file, framing and padding (which a last record may lack) included


def read_headers(path: str | os.PathLike, keys: np.ndarray, offsets: np.ndarray, chunk: int = 1 << 16) -> Headers:
    """Labels and kinds of the records at ``offsets`` ([N] int64, sorted for speed), about a million per second from the page cache.

    Reads no image. A record that does not parse raises the same ``DataError`` as ``RecordReader``.
    """
    reader = RecordReader(path)
    labels, is_image, lengths = (np.empty(len(offsets), dtype) for dtype in (np.float32, bool, np.int64))
    if not reader.size:
        raise DataError(f"{path}: the file is empty")
    data = np.memmap(path, np.uint8, mode="r")
    lead = _PART.size + _HEADER.size
    for start in range(0, len(offsets), chunk):
        some = slice(start, min(start + chunk, len(offsets)))
        at = offsets[some]
        safe = np.clip(at, 0, max(reader.size - lead - 4, 0))  # rows that end too near the end of the file take the slow path
        rows = data[np.minimum(safe[:, None] + np.arange(lead + 4), reader.size - 1)]
        magic, word, flag = (np.ascontiguousarray(rows[:, i : i + 4]).view("<u4")[:, 0] for i in (0, 4, 8))
        single, first = (np.ascontiguousarray(rows[:, i : i + 4]).view("<f4")[:, 0] for i in (12, 32))
        length, label_bytes = (word & MAX_LENGTH).astype(np.int64), 4 * flag.astype(np.int64)
        labels[some] = np.where(flag == 0, single, first)
        is_image[some] = (flag == 0) | (length > _HEADER.size + label_bytes)
        lengths[some] = _PART.size + length + -length % 4
        plain = (safe == at) & (magic == MAGIC) & (word >> 29 == WHOLE) & (length >= _HEADER.size + label_bytes)
        plain &= at + _PART.size + length <= reader.size
        for i in np.flatnonzero(~plain):
            record = reader.read_at(int(at[i]), int(keys[some][i]))
            labels[start + i], is_image[start + i], lengths[start + i] = record.labels[0], record.is_image, record.end - record.offset
    return Headers(labels, is_image, np.minimum(lengths, reader.size - offsets))
