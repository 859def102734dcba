"""Reads every record of a set and names what is wrong with it."""

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.jpeg import jpeg_problem
from data_pipeline.recordio import Record, RecordReader, read_index
from data_pipeline.shard_set import INDEX_NAME, MAX_CLASSES, SIDECAR_NAME, Sidecar, announced_classes, find_field_pair, size_problem


@dataclass
class Report:
    """``findings``: one line each, naming shard, offset and key. ``records``: how many could be read, with an image or without."""

    records: int = 0
    images: int = 0
    findings: list[str] = field(default_factory=list)


def verify(path: Path, *, progress: bool = False) -> Report:
    """Check a set record by record: framing, lengths, labels, JPEG start and end, that records fill the file without gaps, and CRCs.

    Checksums exist in packed sets alone: a byte that changed inside an image of a field set is not found. Raises ``DataError`` when
    ``path`` holds no set, or no readable sidecar or field index; damage to shards or to a packed set's index is a finding.
    """
    if (path / SIDECAR_NAME).is_file():
        return _verify_packed(path, Sidecar.read(path / SIDECAR_NAME), progress)
    return _verify_field(*find_field_pair(path), progress)


def _verify_packed(path: Path, sidecar: Sidecar, progress: bool) -> Report:
    report = Report()
    index = _sorted_index(path / INDEX_NAME, sidecar.num_images, report)
    first, base = 0, 0
    with tqdm(total=sidecar.num_images, unit="img", file=sys.stderr, disable=not progress) as bar:
        for info in sidecar.shards:
            shard = path / info.name
            if problem := size_problem(shard, info.bytes):
                report.findings.append(problem)
            if shard.is_file():
                lines = None if index is None else (index[0][first : first + info.records], index[1][first : first + info.records] - base)
                seen = 0
                for number, record in _records(shard, lines, report, bar):
                    seen += 1
                    expected = info.crc32[8 * number : 8 * number + 8]
                    problems = [_label_problem(record.labels[0], sidecar.num_classes), jpeg_problem(record.image)]
                    if (found := f"{zlib.crc32(record.payload):08x}") != expected:
                        problems.append(f"CRC32 {found}, the sidecar says {expected or 'nothing'}: the record changed after packing")
                    report.findings += [_named(shard, record.offset, record.key, problem) for problem in problems if problem]
                if lines is None and seen != info.records:
                    report.findings.append(f"{shard}: {seen} readable records in file order, the sidecar says {info.records}")
            first, base = first + info.records, base + info.bytes
    return report


def _verify_field(rec: Path, index_path: Path, progress: bool) -> Report:
    report, header, others = Report(), None, 0
    keys, offsets = read_index(index_path)
    order = np.argsort(offsets, kind="stable")
    keys, offsets = keys[order], offsets[order]
    labels = np.full(len(keys), -1.0, np.float32)  # of the image records; -1: none
    with tqdm(total=len(keys), unit="rec", file=sys.stderr, disable=not progress) as bar:
        for number, record in _records(rec, (keys, offsets), report, bar):
            if not record.is_image:
                others += 1
                header = record.labels if record.key == 0 else header
                continue
            problems = [_label_problem(record.labels[0], MAX_CLASSES), jpeg_problem(record.image)]
            labels[number] = record.labels[0]
            report.findings += [_named(rec, record.offset, record.key, problem) for problem in problems if problem]
    classes = announced_classes(header, others - 1)
    if classes is not None:
        for i in np.flatnonzero((labels >= classes) & (labels < MAX_CLASSES)):
            report.findings.append(_named(rec, offsets[i], keys[i], _label_problem(labels[i], classes)))
    if header is not None and header[0] <= MAX_CLASSES and report.images != header[0] - 1:
        report.findings.append(f"{rec}: {report.images} readable image records, the header record announces {header[0] - 1:g}")
    return report


def _records(shard: Path, lines: tuple[np.ndarray, np.ndarray] | None, report: Report, bar: tqdm) -> Iterator[tuple[int, Record]]:
    """Yield (number, record) for what can be read of a shard, and add a finding for what cannot.

    ``lines``: keys and offsets by the index, sorted by offset. None: no usable index; walk in file order, which ends at damage.
    """
    for number, record in _by_index(shard, *lines, report, bar) if lines is not None else _in_file_order(shard, report, bar):
        report.records += 1
        report.images += record.is_image
        yield number, record


def _by_index(shard: Path, keys: np.ndarray, offsets: np.ndarray, report: Report, bar: tqdm) -> Iterator[tuple[int, Record]]:
    reader = RecordReader(shard)
    end: int | None = 0  # where the next record must start; None after damage
    for number, (key, offset) in enumerate(zip(keys.tolist(), offsets.tolist(), strict=True)):
        bar.update()
        if end is not None and offset != end:
            gap, overlap = f"bytes {end} to {offset} before it belong to no record in the index", f"the record before it ends at {end}"
            report.findings.append(_named(shard, offset, key, gap if offset > end else overlap))
        try:
            record = reader.read_at(offset, key)
        except DataError as error:
            report.findings.append(str(error))
            end = None
            continue
        end = record.end
        yield number, record
    if end is not None and end != reader.size:
        report.findings.append(f"{shard}: bytes {end} to {reader.size} at the end belong to no record in the index")


def _in_file_order(shard: Path, report: Report, bar: tqdm) -> Iterator[tuple[int, Record]]:
    try:
        for numbered in enumerate(RecordReader(shard)):
            bar.update()
            yield numbered
    except DataError as error:
        report.findings.append(str(error))


def _sorted_index(path: Path, expected: int, report: Report) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and offsets sorted by offset; None and a finding when the index cannot be used."""
    try:
        keys, offsets = read_index(path)
    except DataError as error:
        report.findings.append(str(error))
        return None
    if len(keys) != expected:
        report.findings.append(f"{path}: lists {len(keys)} records, the sidecar {expected}")
        return None
    order = np.argsort(offsets, kind="stable")
    return keys[order], offsets[order]


def _label_problem(label: float, classes: int) -> str | None:
    """The rule that the loader applies: a whole number in [0, classes). NaN is none."""
    return None if 0 <= label < classes and label == int(label) else f"label {label:g}, expected a whole number in [0, {classes})"


def _named(shard: Path, offset: int, key: int, problem: str) -> str:
    return f"{shard}: record at offset {offset} (key {key}): {problem}"
