"""What a set holds, and what reading it asks of storage and memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.record_table import RECORD
from data_pipeline.shard_set import ShardSet

# What eight GPUs of a node may take: vit_l needs about 0.2 TFLOP an image, its recomputation included, and eight H100s that reach a quarter
# of their peak make 10,000 images/s of that. An estimate, on the safe side for storage.
IMAGES_PER_SECOND_AND_NODE = 10_000
_BLOCK = 1 << 22  # records looked at at a time
_UNLIMITED = 1 << 60  # bytes; cgroups of version 1 write a number above this where there is no limit


@dataclass(frozen=True)
class NodeMemory:
    """Memory of this node, in bytes; None where the system does not say."""

    available: int | None  # MemAvailable: free, or held by caches that give way
    cgroup_limit: int | None  # the smallest limit of this process's control groups

    @property
    def room(self) -> int | None:
        """What a page cache may take: the smaller of the two."""
        return min((size for size in (self.available, self.cgroup_limit) if size is not None), default=None)


@dataclass(frozen=True)
class SetInfo:
    """Sizes in bytes; images, identities, shards and records are counts.

    An image is one read of one record at a place of its own (``loader``, backend "table"). ``needed_memory``: all of what is read, and the
    table of records, which the processes of a node share. ``fits``: whether a node's page cache can keep that; None: not known.
    """

    layout: str
    images: int  # without those in quarantine
    identities: int
    identities_without_image: int
    images_per_identity: dict[str, float]  # min, median, max
    other_records: int  # of a field set: without an image
    quarantined: int
    shards: int
    bytes: int  # of all shards
    seed: int | None  # of the shuffle; a field set does not say
    bytes_per_epoch: int
    bytes_per_image: float
    table_bytes: int
    images_per_second: float  # over all nodes
    nodes: int
    reads_per_second_and_node: float
    bytes_per_second_and_node: float
    needed_memory: int
    memory: NodeMemory
    fits: bool | None

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        packed = self.layout == "packed"
        empty = f" ({self.identities_without_image} without an image)" if self.identities_without_image else ""
        limit = "none" if self.memory.cgroup_limit is None else readable(self.memory.cgroup_limit)
        facts = {
            "layout": "packed (sidecar with CRC32s)" if packed else f"field (.rec and .idx, {self.other_records} records without an image)",
            "images": self.images,
            "identities": f"{self.identities}{empty}",
            "images per identity": ", ".join(f"{name} {value:g}" for name, value in self.images_per_identity.items()),
            "shards": self.shards,
            "bytes": self.bytes,
            "seed": "not known" if self.seed is None else self.seed,
            "quarantine": f"{self.quarantined} more record{'s' * (self.quarantined > 1)}, left out" if self.quarantined else "none",
            "an epoch reads": f"{readable(self.bytes_per_epoch)}, {readable(self.bytes_per_image)} an image",
            "a node reads": f"{readable(self.bytes_per_second_and_node)}/s in {self.reads_per_second_and_node:,.0f} random reads/s, "
            f"at {self.images_per_second:,.0f} images/s over {self.nodes} node{'s' * (self.nodes > 1)}",
            "table of records": f"{readable(self.table_bytes)} of a node's memory, shared by its processes",
            "memory of this node": f"{readable(self.memory.available)} available; limit of its control group: {limit}",
            "page cache": self._page_cache(),
        }
        return [f"{name:<21}{value}" for name, value in facts.items()]

    def _page_cache(self) -> str:
        needed = f"{readable(self.needed_memory)} of images and table"
        if self.fits is None:
            return f"not known whether it holds {needed}"
        if self.fits:
            return f"fits: {needed}; what has been read once stays in memory"
        share = self.memory.room / self.needed_memory
        return f"does not fit: {needed}; at best {100 * share:.0f} % stay in memory, the rest is read in every epoch"


def describe(faces: ShardSet, memory: NodeMemory, *, images_per_second: float | None = None, nodes: int = 1) -> SetInfo:
    """``images_per_second``: what training takes over all ``nodes``; None: ``IMAGES_PER_SECOND_AND_NODE`` on each. Raises ``DataError``."""
    if nodes < 1:
        raise DataError(f"--nodes {nodes}: must be at least 1")
    rate = IMAGES_PER_SECOND_AND_NODE * nodes if images_per_second is None else images_per_second
    if not 0 < rate < float("inf"):
        raise DataError(f"--images-per-second {rate:g}: must be a number above 0")
    counts = faces.images_per_class
    images = int(counts.sum())
    if not images:
        raise DataError(f"{faces.path}: every record is in quarantine")
    size = sum(int(faces.records["length"][i : i + _BLOCK].sum(dtype=np.int64)) for i in range(0, faces.num_images, _BLOCK))
    size -= int(faces.records["length"][faces.excluded].sum(dtype=np.int64))
    table = faces.num_images * RECORD.itemsize
    room = memory.room
    return SetInfo(
        layout=faces.layout,
        images=images,
        identities=faces.num_classes,
        identities_without_image=int((counts == 0).sum()),
        images_per_identity={"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())},
        other_records=faces.other_records,
        quarantined=0 if faces.quarantine is None else len(set(faces.quarantine.places)),
        shards=len(faces.shards),
        bytes=sum(faces.shard_bytes),
        seed=None if faces.sidecar is None else faces.sidecar.seed,
        bytes_per_epoch=size,
        bytes_per_image=size / images,
        table_bytes=table,
        images_per_second=rate,
        nodes=nodes,
        reads_per_second_and_node=rate / nodes,
        bytes_per_second_and_node=rate / nodes * (size / images),
        needed_memory=size + table,
        memory=memory,
        fits=None if room is None else size + table <= room,
    )


def node_memory(root: Path = Path("/")) -> NodeMemory:
    """Read ``proc/meminfo`` and the limits of this process's control group and those above it (version 1 or 2), below ``root``."""
    available = None
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10  # kB there are KiB
    limits = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, file = ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("sys/fs/cgroup", "memory.max")
        folder = root / mount / group.lstrip("/")
        # In a container the group's path may be the host's, which is not there; the limit is then at the top.
        for above in (folder, *folder.parents[: len(Path(group).parts) - 1]):
            limits += [int(limit) for limit in _lines(above / file) if limit.isdecimal() and int(limit) < _UNLIMITED]
    return NodeMemory(available, min(limits, default=None))


def readable(size: float | None) -> str:
    """A number of bytes with three digits, "12.3 kB" (powers of 1000), or "an unknown amount"."""
    if size is None:
        return "an unknown amount"
    power = 0
    while size >= 999.5 and power < 5:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
