"""Requests to stop that come from outside: SIGTERM and SIGUSR1 (Slurm, Kubernetes), and the end of the launcher."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from train.dist import Ranks
from train.processes import ProcessStat

STOPPED = 75  # exit code; EX_TEMPFAIL of sysexits.h: "try again"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")


class Stopped(Exception):
    """The run stopped because it was asked to; its checkpoint is complete. Raised alike on every rank."""


class StopRequests:
    """Listens in a thread of its own, so that a request is heard while the main thread waits in a collective.

    Outside :meth:`held` a request ends this process at once: there is nothing to save. Inside, it is noted in ``reason``, and the process
    has a grace period to come to an end.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._grace_s: float | None = None  # inside held()
        self._lock = threading.Lock()

    def listen(self) -> None:
        """To be called once, on the main thread. A launcher that dies, even by SIGKILL, is noticed too: its ranks would live on."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written to at once, even while the main thread is not in Python
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        sources = {read: ""} | {os.pidfd_open(pid): f"the end of the launcher (process {pid})" for pid in _launchers()}
        threading.Thread(target=self._serve, args=(read, sources), name="stop requests", daemon=True).start()

    @contextmanager
    def held(self, grace_s: float) -> Iterator[None]:
        """Inside, requests are only noted; the process must end within ``grace_s`` seconds of one, or is ended."""
        with self._lock:
            self._grace_s = grace_s
        yield
        with self._lock:
            self._grace_s = None
            if self.reason is not None:
                _exit(f"stopped by {self.reason}")

    def _serve(self, signals: int, sources: dict[int, str]) -> None:
        poll = select.poll()
        for descriptor in sources:
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == signals:
                    for number in os.read(signals, 64):
                        if number in _SIGNALS:
                            self._request(signal.Signals(number).name)
                else:
                    poll.unregister(descriptor)
                    self._request(sources[descriptor])

    def _request(self, reason: str) -> None:
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            if self._grace_s is None:
                _exit(f"stopped by {reason}")
            grace = f"checkpoint.grace_s = {self._grace_s:g}"
            text = f"stopped by {reason}: nothing was saved within {grace} seconds; older checkpoints are whole"
            timer = threading.Timer(self._grace_s, _exit, [text])
            timer.daemon = True
            timer.start()


def _exit(text: str) -> None:
    sys.stderr.write(f"rank {os.environ.get('RANK', 0)}: {text}\n")
    sys.stderr.flush()
    os._exit(STOPPED)


def _launchers() -> list[int]:
    """This process's ancestors as far as they are launchers, parent first; a shell's end is no request to stop."""
    found, pid = [], os.getppid()
    while pid > 0 and hasattr(os, "pidfd_open"):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            parent = ProcessStat.of(pid).parent
        except OSError:  # gone meanwhile
            break
        if not any(name in command for name in _LAUNCHERS):
            break
        found.append(pid)
        pid = parent
    return found


class Flags:
    """What any rank raises, all ranks see, at the same step and without waiting: one call later."""

    def __init__(self, ranks: Ranks) -> None:
        """Collectives: on GPUs a group of its own, because NCCL would wait for the device."""
        self._group = ranks.group
        if ranks.device.type == "cuda":
            self._group = dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *mine: bool) -> list[bool]:
        """What ranks raised at the call before this one; all False at the first.

        Collectives: an all-reduce of [n] uint8, waited for at the next call.
        """
        seen = [False] * len(mine)
        if self._pending is not None:
            flags, work = self._pending
            work.wait()
            seen = flags.bool().tolist()
        flags = torch.tensor(mine, dtype=torch.uint8)
        self._pending = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return seen

    def close(self) -> None:
        """Wait for the last exchange: a group must not go while it is in use."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
