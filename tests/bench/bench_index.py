"""What the index of a set the size of WebFace42M costs a node of eight ranks: time to open, memory, and planning a batch.

``python -m tests.bench.bench_index``. Makes a packed set of 42,474,557 records whose shards are holes (no image is read) in a temporary
folder: its table of records is real, 1.02 GB. Eight processes open it at once, as the ranks of a node do, and look up the records of
batches all over an epoch. Private memory is each process's own; what they map of the table, they share.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.loader import select_records
from data_pipeline.order import EpochOrder
from data_pipeline.record_table import RECORD, AllBut
from data_pipeline.shard_set import FORMAT_VERSION, IDENTITIES_NAME, INDEX_NAME, SIDECAR_NAME, TABLE_NAME, ShardInfo, Sidecar, open_set

RANKS, GLOBAL_BATCH, MICRO_BATCH = 8, 24_576, 384
RECORD_BYTES = 8_192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=42_474_557)
    parser.add_argument("--identities", type=int, default=2_059_906)
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--min-images", type=int, default=1, help="min_images_per_identity of the run")
    parser.add_argument("--batches", type=int, default=200, help="that every rank plans")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_index_") as folder:
        path = write_hollow_set(Path(folder) / "set", arguments.images, arguments.identities, arguments.shards)
        print(f"{arguments.images:,} records, {arguments.identities:,} identities; {RANKS} processes open the set at once")
        context = multiprocessing.get_context("spawn")
        with context.Pool(RANKS) as pool:
            pool.map(_nothing, range(RANKS))  # interpreters and imports are there
            found = pool.starmap(open_and_plan, [(path, rank, arguments.min_images, arguments.batches) for rank in range(RANKS)], 1)
    opened, planned, private, shared = (np.array(column) for column in zip(*found, strict=True))
    print(f"open            slowest {opened.max():.2f} s")
    print(f"plan a batch    {1e6 * planned.mean() / MICRO_BATCH:.2f} us an image, of {MICRO_BATCH} images a rank")
    print(f"private memory  {private.max() / 2**20:.0f} MiB more than before, at most; {private.sum() / 2**20:.0f} MiB on the node")
    print(f"mapped table    {shared.max() / 2**20:.0f} MiB at most, shared")
    print(f"in all          {(private.sum() + shared.max()) / 1e9:.2f} GB on the node")
    return 0


def write_hollow_set(folder: Path, images: int, identities: int, shards: int) -> Path:
    """A packed set with a table of random labels and shards without content."""
    folder.mkdir()
    table = np.lib.format.open_memmap(folder / TABLE_NAME, "w+", RECORD, (images,))
    rng = np.random.default_rng(0)
    for start in range(0, images, 1 << 22):
        block = table[start : start + (1 << 22)]
        numbers = np.arange(start, start + len(block))
        block["offset"], block["length"], block["key"] = numbers * RECORD_BYTES, RECORD_BYTES, numbers
        block["label"] = rng.integers(0, identities, len(block))
    table.flush()
    counts = [len(part) for part in np.array_split(np.empty(images, np.uint8), shards)]
    infos = [ShardInfo(f"shard_{i:05d}.rec", count * RECORD_BYTES, count) for i, count in enumerate(counts)]
    for info in infos:
        with open(folder / info.name, "wb") as file:
            file.truncate(info.bytes)
    (folder / INDEX_NAME).touch()
    (folder / IDENTITIES_NAME).write_text(json.dumps([f"{i:07d}" for i in range(identities)]))
    (folder / SIDECAR_NAME).write_text(Sidecar(FORMAT_VERSION, images, identities, 0, infos, {}).to_json())
    return folder


def _nothing(_: int) -> None:
    time.sleep(0.2)  # so that every process of the pool gets one


def open_and_plan(path: Path, rank: int, min_images: int, batches: int) -> tuple[float, float, int, int]:
    """Seconds to open, seconds per batch planned, and bytes of private and of mapped memory more than before."""
    private, mapped = _memory()
    begin = time.perf_counter()
    faces = open_set(path)
    excluded, _, _ = select_records(faces, min_images)
    order, kept = EpochOrder(faces.num_images - len(excluded), GLOBAL_BATCH, seed=0), AllBut(excluded)
    opened = time.perf_counter() - begin
    labels = 0
    begin = time.perf_counter()
    for step in np.linspace(0, order.steps_per_epoch - 1, batches).astype(int).tolist():
        epoch, positions = order.positions(step * GLOBAL_BATCH, MICRO_BATCH, rank, GLOBAL_BATCH // MICRO_BATCH)
        labels += int(faces.records[kept[order.images(epoch, positions)]]["label"].sum())
    planned = (time.perf_counter() - begin) / batches
    private_now, mapped_now = _memory()
    return opened, planned, private_now - private, mapped_now - mapped


def _memory() -> tuple[int, int]:
    """Bytes of anonymous and of file-backed memory of this process."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


if __name__ == "__main__":
    sys.exit(main())
