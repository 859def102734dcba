"""One run at a time on an output folder: ranks may outlive a launcher that was killed, and a second run would write among their files."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from train.processes import ProcessStat

FILE_NAME = ".lock"


class LockError(ValueError):
    """Another run writes to the output; the message names its process and says what to do."""


@dataclass(frozen=True)
class Owner:
    """The process that writes to an output."""

    host: str
    pid: int
    start_ticks: int  # when it started, in clock ticks since the boot of its host: a later process of that pid has another
    since: str  # local time at which it took the lock

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    @classmethod
    def of_this_process(cls) -> Owner:
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_ticks(pid), datetime.now().isoformat(" ", "seconds"))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """What a lock file says; None if that is nothing, or no owner."""
        try:
            values = json.loads(text)
            return cls(str(values["host"]), int(values["pid"]), int(values["start_ticks"]), str(values["since"]))
        except (ValueError, KeyError, TypeError):
            return None


class OutputLock:
    """The right to write to an output, from the constructor to :meth:`close` or the end of the process.

    The kernel keeps it (flock); the content of ``.lock`` says whose it is, and is all there is on a file system without locks. (Two runs
    that start at the same moment are not kept apart there.) The file stays: one that is removed may be open and locked already.
    """

    def __init__(self, output: Path, say: Callable[[str], None]) -> None:
        """Make the folder ``output`` if need be, and lock it. ``say`` is told when the owner before did not come to its end.

        Raises: LockError if another run has the lock, or may have it; OSError if the file cannot be written.
        """
        output.mkdir(parents=True, exist_ok=True)
        self._file = (output / FILE_NAME).open("a+", encoding="utf-8", errors="replace")  # not "w": that would empty another run's
        try:
            before = self._lock(output)
            self._write(json.dumps(asdict(Owner.of_this_process())))
        except BaseException:
            self._file.close()
            raise
        if before:
            say(f"{output}: taken over from a run that was stopped ({before})")

    def close(self) -> None:
        """Give the lock back. Without this, as after a kill, the next run takes it over and says so."""
        self._write("")
        self._file.close()

    def _lock(self, output: Path) -> Owner | None:
        """Returns the owner before, unless it gave the lock back."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockError(_refusal(output, self._owner())) from None
        except OSError:  # ENOLCK, ENOTSUP, ENOSYS: a file system without locks
            owner = self._owner()
            if owner and owner.host != socket.gethostname():
                unsure = f"This file system has no locks: if that process is gone, remove {output / FILE_NAME}"
                raise LockError(f"{_refusal(output, owner)}. {unsure}") from None
            if owner and owner.start_ticks == _start_ticks(owner.pid):
                raise LockError(_refusal(output, owner)) from None
        return self._owner()

    def _owner(self) -> Owner | None:
        self._file.seek(0)
        return Owner.parse(self._file.read())

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


def writer_of(output: Path) -> str | None:
    """Who writes to ``output`` now, as far as can be told from here; None if nobody does. Nothing is created or taken.

    Where the file system has no locks, a process of another host counts as alive.
    """
    try:
        file = (output / FILE_NAME).open(encoding="utf-8", errors="replace")
    except OSError:
        return None
    with file:
        owner = Owner.parse(file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed
            return None
        except BlockingIOError:
            return str(owner or "its process is not named yet")
        except OSError:
            alive = owner and (owner.host != socket.gethostname() or owner.start_ticks == _start_ticks(owner.pid))
            return str(owner) if alive else None


def _refusal(output: Path, owner: Owner | None) -> str:
    who = f" ({owner})" if owner else ""  # it has locked the file and not written yet
    return f"{output}: another run is writing here{who}; end it first, or choose another output"


def _start_ticks(pid: int) -> int | None:
    """When a process of this host started, as :class:`Owner` counts it; None if no such process is alive."""
    try:
        stat = ProcessStat.of(pid)
    except OSError:
        return None
    return None if stat.state in "ZX" else stat.started
