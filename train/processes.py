"""What the kernel says of a process of this host (proc(5))."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """A line of ``/proc/PID/stat``, in part."""

    state: str  # a letter: R runs, T is stopped, D waits for a disk, Z has ended and its parent has not noticed
    parent: int
    group: int
    started: int  # clock ticks after the boot: a later process of the same id has another

    @classmethod
    def of(cls, pid: int) -> ProcessStat:
        """Raises OSError if there is no such process."""
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = text.rpartition(")")[2].split()  # the program's name before it, in brackets, may hold anything
        return cls(fields[0], int(fields[1]), int(fields[2]), int(fields[19]))


def end_group(group: int, patience_s: float = 30.0) -> None:
    """SIGKILL to every process of a group, and wait until they are gone: what holds gigabytes needs a moment to end.

    One that waits for a disk may outlive the patience.
    """
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + patience_s
    while _is_any_left(group) and time.monotonic() < end:
        time.sleep(0.01)


def _is_any_left(group: int) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = ProcessStat.of(int(folder.name))
            if stat.group == group and stat.state != "Z":
                return True
    return False
