"""Packs images into globally shuffled shards, one index and one table over all of them, and a sidecar that says what they hold."""

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.duplicates import DROPPED_FINDINGS_NAME, duplicates, equal_images, mark_duplicates
from data_pipeline.errors import DataError
from data_pipeline.order import EpochOrder
from data_pipeline.output import publish, refuse_existing, replace_file, write_file
from data_pipeline.record_table import RECORD, write_table_header
from data_pipeline.shard_set import FORMAT_VERSION, IDENTITIES_NAME, INDEX_NAME, SIDECAR_NAME, TABLE_NAME, ShardInfo, Sidecar
from data_pipeline.shard_writer import Policy, ShardWriter, shard_name, shard_state
from data_pipeline.sources import RecordSource, Source, open_source
from data_pipeline.workers import choose_workers, run_to_end

FINDINGS_NAME = "findings.jsonl"
_OWNED = re.compile(
    rf"shard_\d{{5,}}\.rec|{'|'.join(map(re.escape, (INDEX_NAME, SIDECAR_NAME, TABLE_NAME, IDENTITIES_NAME, FINDINGS_NAME)))}"
    r"|quarantine\.jsonl"
)
_SHOWN = 3  # findings of each kind
_BLOCK = 1 << 16  # records of the table in memory


@dataclass(frozen=True)
class Packed:
    """What ``pack`` made. ``findings``: how many of each kind. ``examples``: the first few of each; all are in ``findings.jsonl``."""

    sidecar: Sidecar
    findings: Counter[str]
    examples: list[dict]


def pack(
    sources: Sequence[Path],
    out: Path,
    shards: int,
    *,
    seed: int = 0,
    identities: Sequence[str] | None = None,
    policy: Policy = Policy(),
    workers: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> Packed:
    """Write the images of ``sources`` as ``shards`` record files in the folder ``out``, with what describes them beside.

    A source is a folder of images, ``<source>/<identity>/<image>``, or a set of records that ``shard_set.open_set`` opens. The label of
    an image is the position of its identity among the sorted names (of ``identities``, when given), or the record's; those of a second
    source begin where the first one's end. All images are shuffled with ``seed`` before they are cut into shards of equal counts (+-1,
    before images are dropped): the same sources and seed give the same bytes. JPEG files are stored byte for byte; other formats are
    encoded once (quality 95, 4:4:4).

    ``workers`` processes (None: one per core, and one for a few images) write a shard each, with one image in memory at a time; what
    there is per image lies in files. ``out`` appears when it is complete. A pack that was stopped leaves its finished shards in
    ``.OUT.packing`` beside ``out``, and goes on from them when it is called again for the same sources, shards and seed; those of which
    an image has changed meanwhile are written anew. ``progress`` draws bars on stderr.

    Raises DataError: no such source, an identity without an image or (listed) without a folder, an image that cannot be read or
    is not 112 x 112 (without a ``policy`` for it), more shards than images, an ``out`` that exists (without ``force``).
    """
    refuse_existing(out, _OWNED, force)
    if seed < 0:
        raise DataError(f"--seed {seed}: must be at least 0")
    shown = ", ".join(map(str, sources))
    with _work_folder(out) as folder:
        source = open_source(sources, identities, folder, progress=progress)
        if not 1 <= shards <= len(source):
            raise DataError(f"--shards {shards}: must lie in [1, {len(source)}], the number of images in {shown}")
        plan = {"format_version": FORMAT_VERSION, "sources": [str(path.resolve()) for path in sources], "digest": source.digest}
        _go_on_or_begin(folder, plan | {"shards": shards, "seed": seed}, progress)
        fresh = folder / "set"
        write_file(fresh / IDENTITIES_NAME, json.dumps(source.identities(), indent=0))
        workers = choose_workers(workers, len(source))
        bar = partial(tqdm, unit="img", total=len(source), file=sys.stderr, disable=not progress, smoothing=0.05)
        dropped = ""
        if policy.duplicates == "drop":
            with bar(desc="compare") as counted:
                dropped = mark_duplicates(source, folder, workers, counted.update)
        with bar(desc="pack") as counted:
            run_to_end(ShardWriter(source, folder, shards, seed, policy, dropped), range(shards), workers, counted.update)
        infos = [ShardInfo(**shard_state(folder, number)["info"]) for number in range(shards)]
        if not any(info.records for info in infos):
            raise DataError(f"{shown}: every image was dropped, nothing is left to pack; {folder}/*.jsonl name them")
        _write_tables(folder, fresh, infos)
        sidecar = _write_sidecar(fresh, infos, source.num_classes, seed)
        noted = [*([DROPPED_FINDINGS_NAME] if dropped else []), *(f"{shard_name(number)}.jsonl" for number in range(shards))]
        found = itertools.chain(_noted(folder, noted), _packed_duplicates(source, fresh, seed))
        counts, examples = _write_findings(fresh / FINDINGS_NAME, found)
        publish(fresh, out, _OWNED, force=force)
        shutil.rmtree(folder)
    return Packed(sidecar, counts, examples)


def unfinished(out: Path) -> str | None:
    """What a ``pack`` to ``out`` that was stopped left to go on from, in words; None: nothing."""
    folder = _work_path(out)
    done = [*folder.glob("shard_*.json"), *folder.glob("range_*.json")]
    return f"the same command goes on from what is finished in {folder}; delete that folder if it is not to" if done else None


def _work_path(out: Path) -> Path:
    out = out.resolve()
    return out.parent / f".{out.name}.packing"


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, locked. When something stops us it stays, if there is something to go on from, and vanishes otherwise."""
    folder = _work_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process is packing it; wait for it, or end it first") from None
        try:
            yield folder
        except BaseException:
            if unfinished(out):
                for part in folder.glob("*.part"):
                    part.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _go_on_or_begin(folder: Path, plan: dict, progress: bool) -> None:
    """Keep what was done for the same plan; of another one nothing."""
    path, text, done = folder / "plan.json", json.dumps(plan), len(list(folder.glob("shard_*.json")))
    if not path.exists() or path.read_text() != text:
        if progress and done:
            print(f"starting anew: the {done} finished shards are of other images, another seed or number of shards", file=sys.stderr)
        for entry in folder.iterdir():
            if entry.name == "set":
                shutil.rmtree(entry)
            elif entry.is_file() and entry.name != "lock":  # the folders are lists of the sources' images
                entry.unlink()
        (folder / "set").mkdir()
        replace_file(path, text)
    elif progress and done:
        print(f"going on: {done} of {plan['shards']} shards are finished already", file=sys.stderr)


def _write_tables(folder: Path, fresh: Path, infos: Sequence[ShardInfo]) -> None:
    """Join the shards' tables, and write the text index. Offsets are those in the shards' concatenation."""
    base = 0
    with open(fresh / TABLE_NAME, "wb") as table, open(fresh / INDEX_NAME, "w", encoding="ascii") as index:
        write_table_header(table, sum(info.records for info in infos))
        for number, info in enumerate(infos):
            with open(folder / f"{shard_name(number)}.table", "rb") as part:
                while len(records := np.fromfile(part, RECORD, _BLOCK)):
                    records["offset"] += np.uint64(base)
                    table.write(records.tobytes())
                    index.writelines(f"{key}\t{at}\n" for key, at in zip(records["key"].tolist(), records["offset"].tolist(), strict=True))
            base += info.bytes
        for file in (table, index):
            file.flush()
            os.fsync(file.fileno())


def _noted(folder: Path, names: Sequence[str]) -> Iterator[dict]:
    """The findings that were written while images were read."""
    for name in names:
        with open(folder / name, encoding="ascii") as lines:
            yield from map(json.loads, lines)


def _packed_duplicates(source: Source, fresh: Path, seed: int) -> Iterator[dict]:
    """Images that are equal as stored."""
    stored, order = RecordSource(fresh), EpochOrder(len(source), 1, seed)
    for group in equal_images(stored.faces.records, stored.read_one):
        numbers = sorted(order.images(0, stored.keys(np.array(group))).tolist())
        yield from (finding for _, finding in duplicates(source, numbers))


def _write_findings(path: Path, findings: Iterator[dict]) -> tuple[Counter[str], list[dict]]:
    """A line for each; without any, no file. Returns how many there are of each kind, and the first few of each."""
    counts, examples = Counter(), []
    with open(path, "w", encoding="ascii") as file:
        for finding in findings:
            counts[finding["kind"]] += 1
            if counts[finding["kind"]] <= _SHOWN:
                examples.append(finding)
            file.write(json.dumps(finding) + "\n")
    if not counts:
        path.unlink()
    return counts, examples


def _write_sidecar(fresh: Path, infos: list[ShardInfo], num_classes: int, seed: int) -> Sidecar:
    sha256 = {}
    for name in (TABLE_NAME, INDEX_NAME, IDENTITIES_NAME):
        with open(fresh / name, "rb") as file:
            sha256[name] = hashlib.file_digest(file, "sha256").hexdigest()
    sidecar = Sidecar(FORMAT_VERSION, sum(info.records for info in infos), num_classes, seed, infos, sha256)
    write_file(fresh / SIDECAR_NAME, sidecar.to_json())
    return sidecar
