"""All ranks at once: whether they run the same thing, can add numbers up, how fast, and whether their clocks agree."""

from __future__ import annotations

import hashlib
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.info import readable
from train.checks.finding import Finding, ok, problem, warning
from train.dist import Ranks

_COMPARED = ("torch", "deepspeed", "nvidia-dali-cuda130", "numpy")
_CODE = ("train", "model", "data_pipeline", "eval")  # folders whose Python must be the same everywhere
_REPEATS = 5
_PINGS = 8
_SLOW_LINK = 0.5  # of the median of its kind
_CLOCK_SKEW_S = 1.0


def what_runs_here(root: Path) -> dict[str, str]:
    """Versions and a checksum of the code below ``root``, which must be the same on every rank."""
    found = {"python": platform.python_version()}
    for name in _COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    code = hashlib.sha256()
    for path in sorted(path for folder in _CODE for path in (root / folder).rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {**found, "code": code.hexdigest()[:12]}


def agreement(ranks: Ranks, mine: Mapping[str, str]) -> Iterator[Finding]:
    """Collectives: one gather."""
    everyone = ranks.gather((socket.gethostname(), dict(mine)))
    different = False
    for name in everyone[0][1]:
        groups: dict[str, list[int]] = {}
        for rank, (_, values) in enumerate(everyone):
            groups.setdefault(values[name], []).append(rank)
        if len(groups) > 1:
            different = True
            text = ", ".join(f"{value} on rank{'s' * (len(who) > 1)} {_some(who)}" for value, who in groups.items())
            yield problem("agreement", f"{name}: {text}", "install and check out the same on every node")
    if not different:
        nodes = len({host for host, _ in everyone})
        yield ok("agreement", f"{ranks.world_size} ranks on {nodes} node{'s' * (nodes > 1)} have the same versions and code")


def all_reduce(ranks: Ranks, mib: int) -> Finding:
    """Add up numbers whose sum is known, and tell the bus bandwidth. Collectives: some all-reduces of ``mib`` MiB of float32."""
    backend, size = dist.get_backend(ranks.group), mib << 20
    mine = torch.empty(size // 4, device=ranks.device)
    seconds = []
    for _ in range(1 + _REPEATS):
        mine.fill_(ranks.rank + 1)
        seconds.append(_timed(ranks, lambda: dist.all_reduce(mine, group=ranks.group)))
    expected = ranks.world_size * (ranks.world_size + 1) / 2  # exact in float32
    wrong = ranks.gather(int((mine != expected).sum()))
    if any(wrong):
        who = _some([rank for rank, count in enumerate(wrong) if count])
        found = f"{backend} adds {ranks.world_size} ranks up wrongly: {max(wrong):,} of {mine.numel():,} sums on ranks {who}"
        return problem("all-reduce", found, "take those ranks' nodes out, and let their GPUs and links be tested")
    took = statistics.median(ranks.gather(statistics.median(seconds[1:])))
    bus = 2 * (ranks.world_size - 1) / ranks.world_size * size / took
    return ok("all-reduce", f"{backend} over {ranks.world_size} ranks: {1e3 * took:.1f} ms for {mib} MiB, bus bandwidth {readable(bus)}/s")


def links(ranks: Ranks, mib: int) -> Iterator[Finding]:
    """Send ``mib`` MiB from each rank to the next, one after the other, and name links that are slower than their like.

    Collectives: sends around the ring, and a gather.
    """
    mine = torch.zeros(mib << 18, device=ranks.device)
    speed = 0.0
    for sender in range(ranks.world_size):
        receiver = (sender + 1) % ranks.world_size
        seconds = [_timed(ranks, lambda pair=(sender, receiver): _pass_on(ranks, mine, *pair)) for _ in range(1 + _REPEATS)]
        if ranks.rank == receiver:
            speed = (mib << 20) / min(seconds[1:])
    everyone = ranks.gather((socket.gethostname(), speed))
    yield from slow_links([host for host, _ in everyone], [speed for _, speed in everyone])


def _pass_on(ranks: Ranks, tensor: torch.Tensor, sender: int, receiver: int) -> None:
    if ranks.rank == sender:
        dist.send(tensor, receiver, group=ranks.group)
    elif ranks.rank == receiver:
        dist.recv(tensor, sender, group=ranks.group)


def slow_links(hosts: Sequence[str], speeds: Sequence[float]) -> Iterator[Finding]:
    """``speeds``: bytes/s to each rank from the one before it. Links within a node and between nodes are each compared with their like."""
    kinds: dict[str, list[int]] = {"within nodes": [], "between nodes": []}
    for receiver in range(len(hosts)):
        kinds["within nodes" if hosts[receiver - 1] == hosts[receiver] else "between nodes"].append(receiver)
    for kind, receivers in kinds.items():
        if not receivers:
            continue
        median = statistics.median(speeds[receiver] for receiver in receivers)
        slow = [receiver for receiver in receivers if speeds[receiver] < _SLOW_LINK * median]
        for to in slow:
            source = (to - 1) % len(hosts)
            found = (
                f"rank {source} ({hosts[source]}) to rank {to} ({hosts[to]}): {readable(speeds[to])}/s, the median is {readable(median)}/s"
            )
            yield warning("links", found, "test that cable, card or slot; every all-reduce waits for it")
        if not slow:
            lowest = min(speeds[receiver] for receiver in receivers)
            yield ok("links", f"{len(receivers)} {kind}: {readable(lowest)}/s at least, median {readable(median)}/s")


def clocks(ranks: Ranks, now: Callable[[], float] = time.time) -> Finding:
    """How far the ranks' clocks are from rank 0's. Collectives: messages between rank 0 and each other, and a gather.

    Of several pings the shortest counts: the other clock was read in the middle of it, up to half of its time.
    """
    on_host = dist.get_backend(ranks.group) == "gloo"
    group = ranks.group if on_host else dist.new_group(backend="gloo")  # NCCL sends what lies on GPUs alone
    stamp, offset, error = torch.zeros(1, dtype=torch.float64), 0.0, 0.0
    for other in range(1, ranks.world_size):
        shortest = float("inf")
        for _ in range(_PINGS):
            if ranks.rank == 0:
                dist.recv(stamp, other, group=group)
                stamp[0] = now()
                dist.send(stamp, other, group=group)
            elif ranks.rank == other:
                begin, sent = time.perf_counter(), now()
                dist.send(stamp, 0, group=group)
                dist.recv(stamp, 0, group=group)
                took = time.perf_counter() - begin
                if took < shortest:
                    shortest, offset, error = took, sent + took / 2 - float(stamp), took / 2
    everyone = ranks.gather((socket.gethostname(), offset, error))
    if not on_host:
        dist.destroy_process_group(group)
    rank, (host, worst, error) = max(enumerate(everyone), key=lambda entry: abs(entry[1][1]))
    if abs(worst) - error > _CLOCK_SKEW_S:
        found = f"rank {rank} ({host}) is {abs(worst):.1f} s {'ahead of' if worst > 0 else 'behind'} rank 0 ({everyone[0][0]})"
        return warning("clocks", found, "let chrony or ntpd set the clocks: logs and metrics of nodes do not fit together otherwise")
    return ok("clocks", f"no rank's is off by more than {1e3 * (abs(worst) + error):.2g} ms")


def _timed(ranks: Ranks, action: Callable[[], object]) -> float:
    """Seconds from when all ranks have come here. Collectives: a barrier, and those of ``action``."""
    dist.barrier(group=ranks.group)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    begin = time.perf_counter()
    action()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter() - begin


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
