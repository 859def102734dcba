"""The last rows of a terminal, kept for one process while all that others print scrolls above them.

The terminal itself keeps them (DECSTBM, a scroll region, as apt uses it): what other ranks, the launcher and C libraries write needs no
cooperation, and none of it is overwritten.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor's place and attributes
_WHOLE_SCREEN, _CLEAR_BELOW = "\x1b[r", "\x1b[J"
_RELEASE = f"{_SAVE}{_WHOLE_SCREEN}{_RESTORE}{_CLEAR_BELOW}"
# Ends when its standard input does, and that is when the process that keeps the rows ends, in whatever way; launchers stop it too early.
_GUARD = r"trap '' HUP INT TERM; cat >/dev/null; printf '\0337\033[r\0338\033[J'"


class ReservedRows:
    """Rows at the bottom of a terminal. They are released when this process ends, even by SIGKILL: a child sees to that.

    Every write is one system call, which the kernel does not mix with those of other processes.
    """

    def __init__(self, descriptor: int) -> None:
        """``descriptor``: open on a terminal. Nothing is written to it before the first :meth:`show`."""
        self._descriptor = descriptor
        self._kept: tuple[os.terminal_size, int] | None = None  # the terminal's size when rows were reserved, and how many
        self._guard: subprocess.Popen | None = None

    @property
    def size(self) -> os.terminal_size:
        """Columns and rows of the terminal, now."""
        return os.get_terminal_size(self._descriptor)

    def show(self, lines: Sequence[str]) -> None:
        """Put ``lines``, which may hold colors and must not be longer than the terminal is wide, into the last rows.

        Half of the terminal's rows at most: what comes after those is left out. Raises OSError if the terminal is gone.
        """
        size = self.size
        lines = lines[: size.lines // 2]
        text = ""
        if self._kept != (size, len(lines)):
            text = self._reserve(size, len(lines))
        first = size.lines - len(lines) + 1
        rows = "".join(f"\x1b[{first + i};1H\x1b[2K{line}\x1b[0m" for i, line in enumerate(lines))
        self._write(f"{text}{_SAVE}{rows}{_RESTORE}")

    def _reserve(self, size: os.terminal_size, count: int) -> str:
        if self._guard is None:
            self._guard = subprocess.Popen(
                ["sh", "-c", _GUARD], stdin=subprocess.PIPE, stdout=self._descriptor, stderr=subprocess.DEVNULL, start_new_session=True
            )
        release = _RELEASE if self._kept else ""
        self._kept = (size, count)
        room = "\n" * count  # scrolls where the cursor is in these rows
        return f"{release}{room}{_SAVE}\x1b[1;{size.lines - count}r{_RESTORE}\x1b[{count}A"

    def release(self) -> None:
        """Give the rows back, cleared. A second call does nothing."""
        if self._guard is not None:
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = self._kept = None

    def _write(self, text: str) -> None:
        content = text.encode()
        while content:
            content = content[os.write(self._descriptor, content) :]
