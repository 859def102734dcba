"""Reads every record of a set, names what is wrong, and says which records must not be trained on."""

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.field_set import announced_classes, find_field_pair
from data_pipeline.quarantine import Unfit
from data_pipeline.record_checks import IMAGE, OTHER, UNREAD, Block, Checked, Checker, Finding, gap_problem, starts_record
from data_pipeline.record_table import MAX_CLASSES, are_classes, read_table
from data_pipeline.recordio import MAGIC, RecordReader, index_blocks, read_index
from data_pipeline.shard_set import IDENTITIES_NAME, INDEX_NAME, SIDECAR_NAME, TABLE_NAME, Sidecar, size_problem
from data_pipeline.workers import default_workers, run_jobs

_JOB = 8192  # records
_ALONE = 16384  # so few records are checked by this process alone: starting others takes longer
_TABLE_BLOCK = 1 << 22  # records of the table looked at at a time
_SEARCH = 1 << 20  # bytes

_Run = Callable[[Iterable[Block], int], Iterator[Checked]]  # (blocks, records in all)


@dataclass(frozen=True)
class Report:
    """``records``: how many could be read, with an image or without; ``images``: with one. ``findings``: by file and offset.

    ``root`` and ``shards``: what ``write_quarantine`` takes.
    """

    root: Path
    shards: list[Path]
    records: int
    images: int
    findings: list[Finding]

    @property
    def unfit(self) -> list[Unfit]:
        """The records that must not be trained on, each once."""
        places = groupby((finding for finding in self.findings if finding.unfit), lambda finding: (finding.shard, finding.offset))
        groups = [list(group) for _, group in places]
        return [
            Unfit(group[0].shard.name, group[0].offset, group[0].key, "; ".join(finding.problem for finding in group)) for group in groups
        ]


def verify(path: Path, *, decode: bool = True, workers: int | None = None, progress: bool = False) -> Report:
    """Check a set: the files that describe it, and record by record framing, label, checksum and image.

    Framing: magic number, continuation flag, length, number of labels; records follow each other without gap or overlap, and the index
    lists them all. Label: a whole number in [0, C), of a packed set the one in its table. Checksum: the CRC32 of the image in the table
    of a packed set. A field set has none: a byte that changed inside an image is found there only where decoding fails on it. Image: a
    JPEG with start and end, of 112 x 112 pixels by its frame header, and with ``decode`` all its codes; or such a PNG.

    ``workers`` processes (None: one per core, or this one alone where the set is small). Besides the findings, a process has a few MB
    of the set in memory, the first one also 50 bytes per record of a field set. Raises DataError when ``path`` holds no set, or a
    sidecar that cannot be read.
    """
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers}: must be at least 1")
    run = partial(_run, Checker(decode), workers, progress)
    report = _verify_packed(path, run) if (path / SIDECAR_NAME).is_file() else _verify_field(*find_field_pair(path), run)
    places = {shard: number for number, shard in enumerate(report.shards)}
    report.findings.sort(key=lambda finding: (places.get(finding.shard, -1), -1 if finding.offset is None else finding.offset))
    return report


def _run(checker: Checker, workers: int | None, progress: bool, blocks: Iterable[Block], total: int) -> Iterator[Checked]:
    workers = min(workers or (1 if total <= _ALONE else default_workers()), max(1, -(-total // _JOB)))
    with tqdm(total=total, desc="verify", unit="rec", smoothing=0.05, file=sys.stderr, disable=not progress) as bar:
        yield from run_jobs(checker, blocks, workers, bar.update)


def _verify_packed(path: Path, run: _Run) -> Report:
    sidecar = Sidecar.read(path / SIDECAR_NAME)
    shards = [path / info.name for info in sidecar.shards]
    problems = [size_problem(shard, info.bytes) for shard, info in zip(shards, sidecar.shards, strict=True)]
    findings = [_of_file(shard, problem) for shard, problem in zip(shards, problems, strict=True) if problem]
    table = _sound_table(path / TABLE_NAME, sidecar, findings)
    _check_index(path / INDEX_NAME, table, sidecar, findings)
    named = {finding.shard for finding in findings}
    described = [path / name for name in (TABLE_NAME, INDEX_NAME, IDENTITIES_NAME) if path / name not in named]
    findings += filter(None, (_changed(file, sidecar) for file in described))
    if table is None:
        checked = []
        for shard in filter(Path.is_file, shards):
            whole = _walk(shard, findings)
            checked.append(_check_whole(whole, run))
            findings += _label_findings(whole, checked[-1], sidecar.num_classes)
    else:
        checked = run(_table_blocks(shards, sidecar, table), sidecar.num_images)
    records = images = 0
    for part in checked:
        findings += part.findings
        records, images = records + int((part.kinds != UNREAD).sum()), images + int((part.kinds == IMAGE).sum())
    return Report(path, shards, records, images, findings)


def _of_file(path: Path, problem: object) -> Finding:
    return Finding(path, str(problem).removeprefix(f"{path}: "))


def _sound_table(path: Path, sidecar: Sidecar, findings: list[Finding]) -> np.ndarray | None:
    """The table of a packed set; None when it cannot tell where the records are."""
    try:
        table = read_table(path, sidecar.num_images)
        _check_places(path, table, sidecar)
    except DataError as error:
        findings.append(_of_file(path, error))
        return None
    beyond = sum(int((table["label"][start : start + _TABLE_BLOCK] >= sidecar.num_classes).sum()) for start in _starts(table))
    if beyond:
        findings.append(Finding(path, f"labels beyond the {sidecar.num_classes} identities: {beyond}; pack the set again"))
    return table


def _starts(table: np.ndarray) -> range:
    return range(0, len(table), _TABLE_BLOCK)


def _check_places(path: Path, table: np.ndarray, sidecar: Sidecar) -> None:
    """Raises DataError unless the records fill every shard, as many as the sidecar says, each from the end of the one before it."""
    firsts = np.cumsum([0, *(info.records for info in sidecar.shards)])
    begins = np.cumsum([0, *(info.bytes for info in sidecar.shards)])
    end = 0
    for start in _starts(table):
        some = table[start : start + _TABLE_BLOCK]
        offsets = some["offset"].astype(np.int64)
        ends = offsets + some["length"]
        wrong = np.flatnonzero(offsets != np.append(end, ends[:-1]))
        if len(wrong):
            at = offsets[wrong[0]]
            raise DataError(f"{path}: a record at offset {at} does not begin where the one before it ends; pack the set again")
        end = int(ends[-1])
    at = np.append(table["offset"][firsts[:-1].clip(max=len(table) - 1)].astype(np.int64), end)
    wrong = np.flatnonzero((at != begins) & np.append(np.diff(firsts) > 0, True))
    if len(wrong):
        k = wrong[0]
        raise DataError(f"{path}: the first {firsts[k]} records end at byte {at[k]}, the sidecar says {begins[k]}; pack the set again")


def _check_index(path: Path, table: np.ndarray | None, sidecar: Sidecar, findings: list[Finding]) -> None:
    """Compare the text index, line by line."""
    count = 0
    try:
        for keys, offsets in index_blocks(path):
            if table is not None:
                listed = table[count : count + len(keys)]
                n = len(listed)
                wrong = np.flatnonzero((keys[:n] != listed["key"]) | (offsets[:n] != listed["offset"].astype(np.int64)))
                for i in wrong[:1].tolist():
                    found, expected = f"{keys[i]}\t{offsets[i]}", f"{listed['key'][i]}\t{listed['offset'][i]}"
                    raise DataError(f"{path}: line {count + i + 1}: {found!r}, the set's table says {expected!r}; pack the set again")
            count += len(keys)
        if count != sidecar.num_images:
            raise DataError(f"{path}: lists {count} records, the sidecar says {sidecar.num_images}; pack the set again")
    except DataError as error:
        findings.append(_of_file(path, error))


def _changed(path: Path, sidecar: Sidecar) -> Finding | None:
    """A finding unless the file is, byte for byte, what was packed."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Finding(path, f"cannot be read ({error.strerror}); pack the set again")
    expected = sidecar.sha256.get(path.name)
    return None if found == expected else Finding(path, f"SHA-256 {found}, the sidecar says {expected}: it changed; pack the set again")


def _table_blocks(shards: list[Path], sidecar: Sidecar, table: np.ndarray) -> Iterator[Block]:
    first = begin = 0
    for shard, info in zip(shards, sidecar.shards, strict=True):
        for start in range(first, first + info.records, _JOB) if shard.is_file() else ():
            some = table[start : min(start + _JOB, first + info.records)]
            offsets, *columns = (some[name].astype(np.int64) for name in ("offset", "length", "key", "label", "crc32"))
            yield Block(shard, start, offsets - begin, *columns)
        first, begin = first + info.records, begin + info.bytes


def _verify_field(rec: Path, index: Path, run: _Run) -> Report:
    findings: list[Finding] = []
    try:
        whole = _indexed(rec, index, findings)
    except DataError as error:
        findings.append(_of_file(index, error))
        whole = _walk(rec, findings)
    checked = _check_whole(whole, run)
    images = int((checked.kinds == IMAGE).sum())
    others, unread = whole.offsets[checked.kinds == OTHER], whole.offsets[checked.kinds == UNREAD]
    at = _header(whole, checked, findings)
    header = None if at is None else RecordReader(rec).read_at(int(whole.offsets[at]), 0).labels
    classes = announced_classes(header, others, unread)
    findings += [*checked.findings, *_label_findings(whole, checked, MAX_CLASSES if classes is None else classes)]
    if header is not None and len(header) == 2 and header[1] <= MAX_CLASSES:  # exact
        announced = {"image": (images, header[0] - 1), "identity": (len(others) - 1, header[1] - header[0])}
        for what, (found, expected) in announced.items():
            if (found or what == "image") and not found <= expected <= found + len(unread):
                problem = f"the header announces {expected:g} {what} records, {found} can be read; {len(unread)} records cannot"
                findings.append(Finding(rec, problem, int(whole.offsets[at]), 0))
    return Report(rec, [rec], int((checked.kinds != UNREAD).sum()), images, findings)


def _header(whole: Block, checked: Checked, findings: list[Finding]) -> int | None:
    """Which record is the header: the one with key 0 and labels alone, first as a rule, last in some merged files. None without one."""
    if len(whole) and checked.kinds[0] == OTHER and whole.keys[0]:
        problem = "holds labels alone, as the header record does, whose key is 0: the index is permuted; make it again"
        findings.append(Finding(whole.shard, problem, int(whole.offsets[0]), int(whole.keys[0])))
        return None
    headers = np.flatnonzero((checked.kinds == OTHER) & (whole.keys == 0))
    return int(headers[0]) if len(headers) else None


def _indexed(rec: Path, index: Path, findings: list[Finding]) -> Block:
    """The records of a field set by its index. Raises DataError when it cannot be read."""
    keys, offsets = read_index(index)
    if keys.max() >= 1 << 32:
        raise DataError(f"{index}: key {keys.max()}, expected less than 2^32; make the index again")
    for name, column in (("offset", offsets), ("key", keys)):
        values = np.sort(column)
        repeated = values[1:][values[1:] == values[:-1]]
        if len(repeated):
            i, j = np.flatnonzero(column == repeated[0])[:2].tolist()
            lines = " and ".join(repr(f"{keys[n]}\t{offsets[n]}") for n in (i, j))
            problem = f"the index lists its {name} again ({lines}), and so with {len(repeated) - 1} other lines: make the index again"
            findings.append(Finding(rec, problem, int(offsets[i]), int(keys[i])))
        del values
    order = np.argsort(offsets, kind="stable")
    keys, offsets = keys[order], offsets[order]
    once = np.append(True, offsets[1:] > offsets[:-1])
    if not once.all():
        keys, offsets = keys[once], offsets[once]
    if offsets[0]:
        problem = gap_problem(RecordReader(rec), 0, int(offsets[0]), "before")
        findings.append(Finding(rec, problem, int(offsets[0]), int(keys[0])))
    return Block(rec, 0, offsets, np.diff(offsets, append=max(rec.stat().st_size, int(offsets[-1]))), keys)


def _walk(shard: Path, findings: list[Finding]) -> Block:
    """The records of a shard in file order, where no index or table tells them. Their ids are the keys."""
    reader, at = RecordReader(shard), 0
    keys, offsets, lengths = array("q"), array("q"), array("q")
    while at < reader.size:
        try:
            record = reader.read_at(at)
        except DataError as error:
            end = _next_record(reader, at + 4)
            problem = str(error).removeprefix(f"{Finding(shard, '', at)}")
            findings.append(Finding(shard, f"{problem}; bytes {at} to {end} hold no record that can be read", at))
            at = end
            continue
        for column, value in ((keys, record.id % (1 << 63)), (offsets, at), (lengths, min(record.end, reader.size) - at)):
            column.append(value)
        at = record.end
    return Block(shard, 0, *(np.array(column, np.int64) for column in (offsets, lengths, keys)))


def _next_record(reader: RecordReader, at: int) -> int:
    """The first byte from ``at`` on in steps of 4 where a record seems to start; else the end of the file."""
    while chunk := reader.read_bytes(at, _SEARCH):
        words = np.frombuffer(chunk, "<u4", len(chunk) // 4)
        for i in np.flatnonzero(words == MAGIC).tolist():
            if starts_record(reader, at + 4 * i):
                return at + 4 * i
        at += _SEARCH
    return reader.size


def _check_whole(whole: Block, run: _Run) -> Checked:
    """Check the records of a shard that no table tells."""
    checked = Checked(0, np.zeros(len(whole), np.int8), np.zeros(len(whole), np.float32), [])
    columns = (whole.offsets, whole.lengths, whole.keys)
    blocks = (Block(whole.shard, i, *(column[i : i + _JOB] for column in columns)) for i in range(0, len(whole), _JOB))
    for part in run(blocks, len(whole)):
        here = slice(part.first, part.first + len(part.kinds))
        checked.kinds[here], checked.labels[here] = part.kinds, part.labels
        checked.findings.extend(part.findings)
    return checked


def _label_findings(whole: Block, checked: Checked, classes: int) -> Iterator[Finding]:
    labels = checked.labels
    wrong = (checked.kinds == IMAGE) & ~are_classes(labels, classes)
    for i in np.flatnonzero(wrong).tolist():
        problem = f"label {labels[i]:g}, expected a whole number in [0, {classes})"
        yield Finding(whole.shard, problem, int(whole.offsets[i]), int(whole.keys[i]), unfit=True)
