"""What the kernel says of a process of this host (proc(5))."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """A line of ``/proc/PID/stat``, in part."""

    state: str  # a letter: R runs, T is stopped, D waits for a disk, Z has ended and its parent has not noticed
    parent: int
    started: int  # clock ticks after the boot: a later process of the same id has another

    @classmethod
    def of(cls, pid: int) -> ProcessStat:
        """Raises OSError if there is no such process."""
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = text.rpartition(")")[2].split()  # the program's name before it, in brackets, may hold anything
        return cls(fields[0], int(fields[1]), int(fields[19]))
