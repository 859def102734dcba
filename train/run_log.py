"""What a run has left behind, read back: ``metrics.jsonl``, ``skipped_steps.jsonl``, ``summary.json``, ``recipe.yaml``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from train.guard import FILE_NAME as SKIPPED
from train.metrics import LOG
from train.report import RECIPE, SUMMARY

_PARTS = ("data", "data_wait", "head", "forward", "backward", "comm", "optimizer", "evaluate", "checkpoint", "other")  # data: of older logs


class RunLogError(ValueError):
    """There is no log of a run where one was expected."""


class LogEntry:
    """One log window, by the keys of ``metrics.jsonl``. What is absent, as in older logs, is NaN or empty."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """``values``: a line of the file, or ``asdict`` of a StepRecord."""
        self._values = values
        self.step: int = values["step"]  # optimizer steps taken so far
        self.stage_name: str = values["stage_name"]

    def number(self, *names: str) -> float:
        """The first of ``names`` that there is; NaN if there is none, or it is null."""
        value = next((self._values[name] for name in names if name in self._values), None)
        return math.nan if value is None else value

    def mapping(self, name: str) -> dict[str, float]:
        """Numbers by name; empty if there are none."""
        return {key: value for key, value in (self._values.get(name) or {}).items() if value is not None}

    @property
    def remaining_seconds(self) -> float:
        return self.number("remaining_seconds", "eta_seconds")

    @property
    def skipped_steps(self) -> int:
        """In the window."""
        if "outcomes" in self._values:
            return sum(count for outcome, count in self.mapping("outcomes").items() if outcome != "applied")
        return self._values.get("skipped_steps", 0)

    @property
    def utilization(self) -> float:
        """Floating-point operations per second next to the device's peak (MFU)."""
        return self.number("utilization")

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds of a step by part, ``other`` included, always in the same order; empty if nothing was measured."""
        parts = self.mapping("step_seconds")
        total = parts.pop("total", sum(parts.values()))
        if parts and "other" not in parts:
            parts["other"] = max(0.0, total - sum(parts.values()))
        return {name: parts[name] for name in (*_PARTS, *sorted(parts.keys() - set(_PARTS))) if name in parts}


@dataclass(frozen=True)
class Span:
    """Steps in a row of one stage."""

    name: str
    start: int  # optimizer steps before it
    stop: int


@dataclass(frozen=True)
class RunLog:
    """What is known of a run."""

    folder: Path
    entries: list[LogEntry]  # by step, at least one; of a step that was taken twice the last word
    setbacks: list[int]  # steps after which the log goes on from an earlier one: a restart or a rollback
    skipped: list[dict[str, Any]]  # lines of skipped_steps.jsonl by step, the last of each
    summary: dict[str, Any] | None  # of a complete run
    recipe: str  # YAML; "" if there is none
    unreadable: int  # lines that are no JSON, all files together

    @property
    def stages(self) -> list[Span]:
        spans, start = [], 0
        for name, entries in groupby(self.entries, key=lambda entry: entry.stage_name):
            stop = list(entries)[-1].step
            spans.append(Span(name, start, stop))
            start = stop
        return spans

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints that the log tells of, kept or deleted since."""
        steps = {entry.number("checkpoint_step") for entry in self.entries}
        return sorted(int(step) for step in steps if math.isfinite(step))

    @property
    def restarts(self) -> int:
        """As the log counts them; older logs do not, and the setbacks that can be seen in it have to do."""
        restarts = self.entries[-1].number("restarts")
        return int(restarts) if math.isfinite(restarts) else len(self.setbacks)

    @property
    def skipped_steps(self) -> int:
        return sum(entry.skipped_steps for entry in self.entries)


def read_run(folder: Path) -> RunLog:
    """Raises: RunLogError if ``folder`` holds no log, or one without a complete line; OSError."""
    if not folder.is_dir():
        raise RunLogError(f"{folder}: no such folder; expected the output of a run")
    path = folder / LOG
    if not path.is_file():
        raise RunLogError(f"{folder}: no {LOG} in it; expected the output of a run that has logged a step")
    lines, unreadable = _read_lines(path)
    entries: list[LogEntry] = []
    setbacks = []
    for entry in map(LogEntry, lines):
        if entries and entry.step <= entries[-1].step:
            setbacks.append(entries[-1].step)
            while entries and entries[-1].step >= entry.step:
                entries.pop()
        entries.append(entry)
    if not entries:
        raise RunLogError(f"{path}: holds no complete line; expected one for each log window of the run")
    skipped, more_unreadable = _read_lines(folder / SKIPPED) if (folder / SKIPPED).is_file() else ([], 0)
    by_step = {line["step"]: line for line in skipped}
    summary, recipe = folder / SUMMARY, folder / RECIPE
    return RunLog(
        folder,
        entries,
        setbacks,
        [by_step[step] for step in sorted(by_step)],
        json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        unreadable + more_unreadable,
    )


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects of a step, and how many others there are: a kill tears the last one."""
    lines, unreadable = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            unreadable += 1
    return lines, unreadable
