"""A terminal as a person sees it: a pseudo terminal whose output pyte draws."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Callable

import pyte


class Screen:
    """``descriptor`` is what a program writes to; ``rows()`` what is then to be seen, ``history()`` what has scrolled out above."""

    def __init__(self, columns: int, rows: int) -> None:
        self._master, self.descriptor = pty.openpty()
        self._screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        self._resize_terminal(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        self._resize_terminal(columns, rows)

    def _resize_terminal(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def rows(self) -> list[str]:
        """All that has been written by now, without blanks at the ends of lines."""
        while select.select([self._master], [], [], 0)[0]:
            self._stream.feed(os.read(self._master, 65536))
        return [line.rstrip() for line in self._screen.display]

    def history(self) -> list[str]:
        return ["".join(row[column].data for column in range(self._screen.columns)).rstrip() for row in self._screen.history.top]

    def everything(self) -> list[str]:
        """Lines that are not empty, the oldest first."""
        rows = self.rows()
        return [line for line in (*self.history(), *rows) if line]

    def wait_for(self, seen: Callable[[], bool], seconds: float = 60.0) -> None:
        """Raises AssertionError with the screen if ``seen`` does not become true."""
        end = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < end, "\n".join(self.rows())
            time.sleep(0.02)

    @property
    def scrolls_whole(self) -> bool:
        """Whether no row is kept from scrolling."""
        return self._screen.margins is None or self._screen.margins == (0, self._screen.lines - 1)

    def close(self) -> None:
        os.close(self._master)
        os.close(self.descriptor)
