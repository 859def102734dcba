"""Where the time goes: of a step in parts, of a run in kinds; measured without making the device wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from train.processes import ProcessStat

# Of a step. comm: waiting for other ranks, wherever it happens, and not counted there again. other: what is in no part.
PARTS = ("data_wait", "head", "forward", "backward", "comm", "optimizer", "evaluate", "checkpoint", "other")
# Of a run. train: steps that were applied; repeat: those that had been taken before a restart or a rollback; skip: those that were skipped.
RUN_TIMES = ("start", "train", "repeat", "skip", "checkpoint", "evaluate")


@dataclass(frozen=True)
class Window:
    """The steps between two log lines."""

    parts: dict[str, float]  # seconds in all its steps, by part; empty while nothing has been measured
    steps: list[float]  # seconds of each

    @property
    def total(self) -> float:
        return sum(self.steps)

    def per_step(self) -> dict[str, float]:
        """Mean seconds of a step by part, and ``total``; empty while nothing has been measured."""
        if not self.steps:
            return {}
        return {name: seconds / len(self.steps) for name, seconds in {**self.parts, "total": self.total}.items()}


class PartTimer:
    """Seconds of the steps of a log window, by part.

    ``with timer.part("forward"): ...`` may be entered several times per step, and inside another part, whose time it then is not. On a CPU
    the host's clock is read. On CUDA events are recorded in the current stream and read one window later, when they have long been reached:
    data_wait and comm are then what the device waited, not what the host did meanwhile. (The CUDA clock has not been run on a GPU yet.)
    """

    def __init__(self, device_type: Literal["cpu", "cuda"]):
        self._clock = _CudaClock() if device_type == "cuda" else _HostClock()
        self._unread: list[tuple[list, list]] = []  # (spans, marks of the steps' ends) of closed windows, oldest first
        self._open: list[str] = []  # parts that are being timed, the innermost last
        self.restart()

    def restart(self) -> None:
        """Leave out what came before the coming step."""
        self._spans: list[tuple[str, str | None, Any, Any]] = []  # part, part around it, from, to
        self._marks = [self._clock.mark()]  # begin of the window, and the end of each step

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as ``name``, one of PARTS other than ``other``."""
        around = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._clock.mark()
        try:
            yield
        finally:
            self._open.pop()
        self._spans.append((name, around, start, self._clock.mark()))

    def end_step(self) -> None:
        self._marks.append(self._clock.mark())

    def window(self) -> Window:
        """Close the window at the end of its last step and return it; on CUDA the one before, an empty one at first."""
        self._unread.append((self._spans, self._marks))
        self._spans, self._marks = [], self._marks[-1:]
        if len(self._unread) <= self._clock.windows_late:
            return Window({}, [])
        spans, marks = self._unread.pop(0)
        steps = [self._clock.seconds(start, end) for start, end in pairwise(marks)]
        parts = dict.fromkeys(PARTS, 0.0)
        for name, around, start, end in spans:
            seconds = self._clock.seconds(start, end)
            parts[name] += seconds
            if around:
                parts[around] -= seconds
        parts["other"] = sum(steps) - sum(parts.values())
        return Window(parts, steps)


class _HostClock:
    windows_late = 0

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    windows_late = 1

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()  # returns at once unless the device is more than a whole window behind
        return start.elapsed_time(end) / 1000


class RunTime:
    """Seconds since this process began, by kind (RUN_TIMES)."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """``now``: seconds on a clock that only goes forward."""
        self._now = now
        ticks_per_second = os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ProcessStat.of(os.getpid()).started / ticks_per_second
        self._last = now() - age
        self.seconds = dict.fromkeys(RUN_TIMES, 0.0)

    def lap(self, kind: str) -> None:
        """What has passed since the last call, or since the process began, was ``kind``."""
        self.seconds, self._last = self.so_far(kind), self._now()

    def so_far(self, kind: str) -> dict[str, float]:
        """``seconds``, with what has passed since the last lap as ``kind``; for other threads too."""
        return {**self.seconds, kind: self.seconds[kind] + self._now() - self._last}


_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


def time_collectives(timer: PartTimer) -> None:
    """From now on time DeepSpeed's collectives as ``comm``: what this process, or on a GPU its stream, waits for them.

    To be called once in a process, after DeepSpeed has joined its process group.
    """
    from deepspeed.comm import comm

    for name in _COLLECTIVES:
        if hasattr(comm.cdb, name):
            setattr(comm.cdb, name, _timed(getattr(comm.cdb, name), timer))


def _timed(call: Callable, timer: PartTimer) -> Callable:
    def timed(*args, **kwargs):
        with timer.part("comm"):
            started = call(*args, **kwargs)
        return _TimedWork(started, timer) if hasattr(started, "wait") else started

    return timed


class _TimedWork:
    """A transfer under way, whose wait is timed."""

    def __init__(self, work: Any, timer: PartTimer) -> None:
        self._work, self._timer = work, timer

    def wait(self, *args, **kwargs) -> Any:
        with self._timer.part("comm"):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
