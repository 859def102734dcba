"""What the tests that kill things need to know of processes."""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

ROOT = Path(__file__).resolve().parents[2]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(pid: int, command: str) -> list[int]:
    """The living processes that ``pid`` started whose command line holds ``command``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            line = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and command.encode() in line:
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], process: Popen | None = None, timeout_s: float = 60) -> None:
    """Poll. Fails when ``process`` ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
