"""Where a run stands, for the person who looks on: a view at the bottom of the terminal, or a log line per window."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from train.metric_table import StepRecord
from train.report import progress_line
from train.run_log import LogEntry
from train.table import format_seconds
from train.terminal import ReservedRows

_PART_STYLES = {
    "data_wait": "yellow",
    "head": "magenta",
    "forward": "blue",
    "backward": "cyan",
    "comm": "red",
    "optimizer": "green",
    "checkpoint": "white",
    "other": "bright_black",
}
_NAME_CELLS = 10  # of a row's name
_FEWEST_ROWS = 10  # of a terminal
_SLOW_STEP_S = 10.0  # a step that takes longer is shown to be under way


class Progress(Protocol):
    """What shows a run's progress, on rank 0."""

    def step(self, step: int, total_steps: int) -> None:
        """``step`` of ``total_steps``, as far as those are known now, have been taken."""

    def window(self, record: StepRecord) -> None:
        """A log window is over."""

    def close(self) -> None:
        """The steps are over, or the run is. A second call does nothing."""


def open_progress(live: bool, title: str, say: Callable[[str], None], stream: TextIO) -> Progress:
    """A live view, or log lines where the recipe does not want one (``live``) or ``stream`` is no terminal that can show one."""
    shown = live and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if shown and os.get_terminal_size(stream.fileno()).lines >= _FEWEST_ROWS:  # 0: one that nobody has told its size
        return LiveView(title, say, stream.fileno())
    return LogLines(say)


class LogLines:
    """A line per log window."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._total_steps = say, 0

    def step(self, step: int, total_steps: int) -> None:
        self._total_steps = total_steps

    def window(self, record: StepRecord) -> None:
        self._say(progress_line(record, self._total_steps))

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Standing:
    """What the view shows."""

    step: int
    total_steps: int
    stepped: float  # when that step was over, seconds on the monotonic clock
    entry: LogEntry | None = None  # of the last log window; None before the first
    logged: float = 0.0  # when it came


class LiveView:
    """The last rows of the terminal, drawn anew by a thread of its own; all that is printed scrolls above them.

    When it closes, the line of the last window stays in their place. A terminal that goes away takes the view with it, and nothing else.
    """

    def __init__(self, title: str, say: Callable[[str], None], descriptor: int, interval_s: float = 0.5) -> None:
        """
        Args:
            title: of the view, such as the run's folder.
            say: prints a line.
            descriptor: open on a terminal.
            interval_s: seconds from drawing to drawing.
        """
        self._title, self._say, self._interval_s = title, say, interval_s
        self._rows = ReservedRows(descriptor)
        self._standing: Standing | None = None  # replaced as a whole
        self._last_line = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)

    def step(self, step: int, total_steps: int) -> None:
        now, before = time.monotonic(), self._standing
        self._standing = replace(before or Standing(step, total_steps, now), step=step, total_steps=total_steps, stepped=now)
        if before is None:
            self._thread.start()

    def window(self, record: StepRecord) -> None:
        self._standing = replace(self._standing, entry=LogEntry(asdict(record)), logged=time.monotonic())
        self._last_line = progress_line(record, self._standing.total_steps)

    def close(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._last_line:
            self._say(self._last_line)

    def _draw(self) -> None:
        try:
            while not self._over.is_set():
                self._rows.show(render(view(self._title, self._standing, time.monotonic()), max(1, self._rows.size.columns)))
                self._over.wait(self._interval_s)
            self._rows.release()
        except OSError:
            return


def render(content: RenderableType, columns: int) -> list[str]:
    """Lines of at most ``columns`` (> 0) cells, with escape codes for colors unless NO_COLOR is set."""
    console = Console(file=StringIO(), width=columns, force_terminal=True, legacy_windows=False)
    console.print(content, no_wrap=True, overflow="ellipsis", crop=True)
    return console.file.getvalue().splitlines()


def view(title: str, standing: Standing, now: float) -> RenderableType:
    """``now``: seconds on the monotonic clock. What is not known is left out."""
    bar = ProgressBar(total=standing.total_steps, completed=standing.step, complete_style="green", finished_style="green")
    done = Text(f"{standing.step:,}/{standing.total_steps:,}  {standing.step / standing.total_steps:.0%}")
    entry = standing.entry
    if entry and math.isfinite(entry.remaining_seconds):
        done.append(f"  ETA {format_seconds(max(0.0, entry.remaining_seconds - (now - standing.logged)))}", "bold")
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(no_wrap=True, min_width=_NAME_CELLS)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    head.add_row("step", bar, done)
    rows = Table.grid(padding=(0, 1))
    rows.add_column(no_wrap=True, min_width=_NAME_CELLS)
    rows.add_column(no_wrap=True, overflow="ellipsis")
    if entry:
        for name, text in _facts(entry):
            rows.add_row(name, text)
    if now - standing.stepped > _SLOW_STEP_S:
        rows.add_row("waiting", Text(f"step {standing.step + 1:,} since {format_seconds(now - standing.stepped)}", "yellow"))
    return Group(Rule(title, style="bright_black"), head, rows)


def _facts(entry: LogEntry) -> list[tuple[str, Text]]:
    """Name and text of each row."""
    facts = [
        ("stage", _join(entry.stage_name, _number("epoch {:.2f}", entry, "epoch"), _number("lr {:.2e}", entry, "learning_rate"))),
        (
            "loss",
            _join(
                _number("{:.4f}", entry, "loss"),
                _number("highest {:.4f}", entry, "loss_maximum"),
                _number("target cosine {:.3f}", entry, "target_cosine"),
                _number("|g| {:.3g}", entry, "gradient_norm"),
                Text(f"skipped {entry.skipped_steps}", "red") if entry.skipped_steps else "",
            ),
        ),
        (
            "speed",
            _join(
                _number("{:,.0f} images/s", entry, "images_per_second"),
                f"MFU {entry.utilization:.0%}" if math.isfinite(entry.utilization) else "",
            ),
        ),
    ]
    memory = entry.mapping("memory")
    if memory:
        facts.append(("memory", _join(*(f"{kind} {size / 1e9:.1f} GB" for kind, size in memory.items()))))
    total = sum(entry.parts.values())
    parts = {name: seconds / total for name, seconds in entry.parts.items() if seconds >= 0.005 * total > 0}
    shares = [Text(f"{name} {share:.0%}", _PART_STYLES.get(name, "")) for name, share in parts.items()]
    if shares:
        facts.append(("time", _join(*shares)))
    if math.isfinite(entry.number("checkpoint_step")):
        ago = time.time() - entry.number("checkpoint_timestamp_seconds")
        facts.append(
            (
                "checkpoint",
                _join(
                    _number("step {:,.0f}", entry, "checkpoint_step"),
                    f"{format_seconds(ago)} ago" if math.isfinite(ago) else "",
                    _number("held up {:.2f} s", entry, "checkpoint_blocked_seconds"),
                    _number("written in {:.1f} s", entry, "checkpoint_write_seconds"),
                ),
            )
        )
    return facts


def _join(*parts: Text | str) -> Text:
    return Text("  ").join(Text(part) if isinstance(part, str) else part for part in parts if part)


def _number(form: str, entry: LogEntry, name: str) -> str:
    value = entry.number(name)
    return form.format(value) if math.isfinite(value) else ""
