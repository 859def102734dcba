"""What a check has to say: a line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # a run works, but slower, or not with every recipe
    PROBLEM = "problem"  # a run fails, hangs, or goes wrong


@dataclass(frozen=True)
class Finding:
    """What one check found, and for all that is not ok what cures it."""

    level: Level
    check: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        cure = f"; {self.cure}" if self.cure else ""
        return f"{self.level:<8} {self.check:<14} {self.found}{cure}"


def ok(check: str, found: str) -> Finding:
    return Finding(Level.OK, check, found)


def warning(check: str, found: str, cure: str) -> Finding:
    return Finding(Level.WARNING, check, found, cure)


def problem(check: str, found: str, cure: str) -> Finding:
    return Finding(Level.PROBLEM, check, found, cure)
