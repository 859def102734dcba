"""Tables and times as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def table(rows: Sequence[Sequence[str]], align: Callable[[str, int], str] = str.ljust) -> list[str]:
    """Lines of ``rows``, every column as wide as its widest cell. ``align``: str.ljust or str.rjust."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(align(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_seconds(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
