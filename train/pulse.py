"""Where every rank stands: what each tells all others, twice a second, whatever its training thread does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from train.processes import ProcessStat

KEEPER = 0  # rank whose process keeps the store


@dataclass(frozen=True)
class Process:
    """A process, recognisable to others of its node."""

    host: str
    node: str  # equal where process ids are the same
    pid: int
    started: int  # clock ticks after the node; process ids are used again

    @classmethod
    def current(cls) -> Process:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid = os.getpid()
        return cls(socket.gethostname(), f"{boot} {os.readlink('/proc/self/ns/pid')}", pid, ProcessStat.of(pid).started)

    def state(self) -> str:
        """The kernel's letter: T is stopped, D waits for a disk, Z has ended, "" is gone (proc(5)). Of a process of this node."""
        try:
            stat = ProcessStat.of(self.pid)
        except OSError:
            return ""
        return stat.state if stat.started == self.started else ""


@dataclass(frozen=True)
class Pulse:
    """Where a rank stands."""

    rank: int
    phase: str
    step: int  # optimizer steps completed
    entered: int  # phases and parts of long ones, since the start. All ranks go through the same: the smallest number is farthest behind
    seconds: float  # in this phase
    waiting: bool  # the training thread is inside a collective
    at: str  # its innermost Python frame
    alarm: bool  # this rank ends the run, because it or another stood still for too long; the rest is as it was when it decided so
    stopped: float  # seconds for which its process as a whole was stopped until a moment ago; 0: it was not
    process: Process

    @property
    def place(self) -> str:
        return f"phase {self.phase}" + ("" if self.phase == "start" else f" after step {self.step}")


class Pulses:
    """The newest pulse of every rank, exchanged through a store that rank 0 keeps.

    By a thread of its own: where the keeper stands still, a call to the store never returns, whatever its timeout. The store is not that
    of the process group, which torchrun keeps outside of all ranks: here the keeper is always a rank, which can be named.
    An exchange of one rank is two requests, and some 400 bytes for every rank.
    """

    def __init__(self, interval_s: float, tell: Callable[[], Pulse]) -> None:
        """``tell``: this rank's pulse, now."""
        self.latest: dict[int, Pulse] = {}  # by rank; replaced as a whole; empty before the first exchange
        self._interval_s, self._tell = interval_s, tell
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="pulses", daemon=True)

    def start(self, rank: int, world_size: int, broadcast: Callable[[object], object]) -> None:
        """Meet at the store and begin. Collectives: one ``broadcast``, of rank 0's value."""
        self._rank, self._world_size = rank, world_size
        keep, timeout = rank == KEEPER, timedelta(seconds=60)
        host = os.environ["MASTER_ADDR"]
        if keep:
            self._store = dist.TCPStore(host, 0, world_size, True, timeout, wait_for_workers=False)
        port = broadcast(self._store.port if keep else None)
        if not keep:
            self._store = dist.TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
        self._thread.start()

    def close(self) -> None:
        """End in order: the keeper last, so that no other rank finds the store gone."""
        self._closed.set()
        if not self._thread.is_alive():
            return
        self._thread.join(self._interval_s)
        if self._thread.is_alive():
            return
        with contextlib.suppress(RuntimeError):  # the others may have lost the store already, or be late
            self._store.set(f"closed{self._rank}", "")
            if self._rank == KEEPER:
                self._store.wait([f"closed{rank}" for rank in range(self._world_size)], timedelta(seconds=5))

    def _exchange(self) -> None:
        keys = [f"pulse{rank}" for rank in range(self._world_size)]
        while True:
            with contextlib.suppress(RuntimeError):  # the store has gone with its keeper: what was heard last has to do
                self._store.set(keys[self._rank], json.dumps(asdict(self._tell())))
                self.latest = dict(enumerate(map(_read_pulse, self._store.multi_get(keys))))
            if self._closed.wait(self._interval_s):
                return


def _read_pulse(text: bytes) -> Pulse:
    values = json.loads(text)
    return Pulse(**{**values, "process": Process(**values["process"])})
