"""A deadline for every phase of a run: a rank that stands still ends the run on all of them, instead of holding them up for ever.

Each rank watches itself. The first whose phase outlives its deadline raises the alarm, which its pulse carries to all others
(train.pulse). Every rank then tells the stacks of its threads, one of them says in a line who is stuck (train.verdict), and all exit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from train.config import WatchdogConfig
from train.dist import Ranks
from train.pulse import KEEPER, Process, Pulse, Pulses
from train.verdict import ranks_text, silent_ranks, verdict, why_silent

HUNG = 3  # exit code of every rank of a run that stood still
_INTERVAL_S = 0.5  # between two looks
_WAKE_S = 1.5  # for the others to answer an alarm, before those that are stopped are woken
_ANSWER_S = 6.0  # for all of them, with those: several looks and exchanges
_WRITE_S = 2.0  # for writing to a terminal, a pipe or a file system, which may be what hangs
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "model/collectives.py")  # files whose functions wait for other ranks
_STOPPED_S = 5.0  # between two looks: this process was stopped in between


PHASES = ("start", "data", "head", "forward", "backward", "optimizer", "evaluate", "checkpoint", "loop", "end")


class Position(NamedTuple):
    """Where the training thread is; written by it alone."""

    phase: str
    step: int
    entered: int  # see Pulse
    since: float  # on the watchdog's clock
    at: float  # the same in seconds since 1970


class Watchdog:
    """Watches the thread that makes it, from ``with watchdog:`` to the end of that block; before and outside it only notes phases.

    Phases are PHASES: ``start`` before the training loop, ``end`` after it, ``loop`` between the others. Time for which this process was
    stopped as a whole does not count: a job that is suspended and resumed goes on.
    """

    def __init__(self, config: WatchdogConfig, ranks: Ranks, folder: Path) -> None:
        """``folder``: for the stacks, ``rank_00000.txt`` and so on; made when there are any."""
        self._config, self._rank, self._world_size, self._folder = config, ranks.rank, ranks.world_size, folder
        self._process = Process.current()
        self._training_thread = threading.get_ident()
        self._interval_s = min(_INTERVAL_S, config.shortest_s / 10)
        self._seconds = 0.0  # this clock: what has passed in the block, without times in which the process was stopped
        self._position = Position("start", 0, 0, 0.0, time.time())
        self._stopped, self._woken_at = 0.0, 0.0  # how long this process was stopped, the last time; and when that ended, on this clock
        self._alarm: Pulse | None = None  # where this rank was when it began to end the run
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._pulses = Pulses(self._interval_s, self._pulse)

    def enter(self, phase: str, step: int) -> None:
        """``step``: optimizer steps completed. For the training thread; it costs some microseconds."""
        self._position = Position(phase, step, self._position.entered + 1, self._seconds, time.time())

    def beat(self) -> None:
        """The phase gets on: its deadline begins anew. For work of many equal parts that may take long, on all ranks equally often."""
        self.enter(self._position.phase, self._position.step)

    @property
    def position(self) -> Position:
        return self._position

    def connect(self, ranks: Ranks) -> None:
        """Begin to exchange pulses with the other ranks. Collectives: one broadcast."""
        if self._world_size > 1:
            self._pulses.start(self._rank, self._world_size, ranks.broadcast)

    def loss(self, reason: str) -> str:
        """What to say if this rank has lost its connection to others, which ``reason`` describes: who is dead, if that can be seen here."""
        time.sleep(0.2)  # the kernel closes the connections of a process before that is dead
        near = {rank: pulse.process for rank, pulse in self._pulses.latest.items() if pulse.process.node == self._process.node}
        dead = [rank for rank, process in near.items() if process.state() in ("", "Z")]
        who = f"{ranks_text(dead)} dead" if dead else "another rank has died"
        return f"{who}, noticed in {self._pulse().place} ({reason}); what it said last, or the kernel's log, tells why"

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()  # for good if there is an alarm: what went wrong here came of other ranks leaving
        if error[0] is None:
            self._pulses.close()

    def _pulse(self) -> Pulse:
        if self._alarm:
            return self._alarm
        position, now = self._position, self._seconds
        frame = sys._current_frames().get(self._training_thread)
        return Pulse(
            rank=self._rank,
            phase=position.phase,
            step=position.step,
            entered=position.entered,
            seconds=now - position.since,
            waiting=_in_collective(frame),
            at=_describe(frame),
            alarm=False,
            stopped=self._stopped if now - self._woken_at < _ANSWER_S else 0.0,
            process=self._process,
        )

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval_s):
            passed = time.monotonic() - before
            before += passed
            self._seconds += min(passed, _STOPPED_S)
            if passed > _STOPPED_S:
                self._stopped, self._woken_at = passed, self._seconds
            mine = self._pulse()
            if mine.seconds > self._config.deadline(mine.phase) or any(pulse.alarm for pulse in self._pulses.latest.values()):
                self._end_run()

    def _end_run(self) -> NoReturn:
        """Within some ten seconds, whatever hangs."""
        try:
            self._tell()
        except Exception:
            problem = traceback.format_exc().encode()
            _in_time(lambda: _write(2, problem))
        finally:
            os._exit(HUNG)

    def _tell(self) -> None:
        """This rank's stacks, and who is stuck."""
        self._alarm = dataclasses.replace(self._pulse(), alarm=True)
        _ignore_sigterm()
        stacks = self._stacks()
        _in_time(lambda: _write(2, stacks), lambda: self._save(stacks))
        pulses, silent = self._answers()
        if self._rank == min(pulses.keys() - silent.keys()):
            text = verdict(pulses, silent, self._config)
            line = f"error: {text}. Stacks: above, and in {self._folder}. Start again to go on from the newest checkpoint.\n"
            _in_time(lambda: _write(2, line.encode()))
        if self._rank == KEEPER:
            time.sleep(2 * self._interval_s)  # the store ends with this process: let the others read its answer

    def _stacks(self) -> bytes:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        head = f"rank {self._rank} at {now}: {self._pulse().place}; the training thread is 0x{self._training_thread:016x}\n"
        with os.fdopen(os.memfd_create("stacks"), "w+b") as file:  # faulthandler needs a file; one on disk might hang
            faulthandler.dump_traceback(file)
            file.seek(0)
            return head.encode() + file.read()

    def _save(self, stacks: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"rank_{self._rank:05d}.txt").write_bytes(stacks)

    def _answers(self) -> tuple[Mapping[int, Pulse], Mapping[int, str]]:
        """The last pulse of every rank, and of each that did not answer the alarm why."""
        if not self._pulses.latest:  # alone, or not yet connected
            return {self._rank: self._pulse()}, {}
        self._wait_for_answers(_WAKE_S)
        reasons = {}
        for rank in silent_ranks(self._pulses.latest, self._rank):
            process = self._pulses.latest[rank].process
            reasons[rank] = why_silent(process, self._process.node)
            if process.node == self._process.node and process.state() == "T":  # it can neither end nor tell its stacks
                os.kill(process.pid, signal.SIGCONT)
        self._wait_for_answers(_ANSWER_S - _WAKE_S)
        silent = {rank: reasons[rank] for rank in silent_ranks(self._pulses.latest, self._rank) if rank in reasons}
        return {**self._pulses.latest, self._rank: self._pulse()}, silent

    def _wait_for_answers(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while silent_ranks(self._pulses.latest, self._rank) and time.monotonic() < end:
            time.sleep(self._interval_s / 5)


def _ignore_sigterm() -> None:
    """The launcher stops all ranks when the first has ended: let each say what it has to. signal.signal is for the main thread alone."""
    faulthandler.register(signal.SIGTERM, open(os.devnull, "w"), all_threads=False)  # noqa: SIM115 - as long as the process lives


def _in_time(*actions: Callable[[], None]) -> None:
    """Do them side by side, for at most _WRITE_S; what fails or takes longer is left alone."""

    def attempt(action: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            action()

    threads = [threading.Thread(target=attempt, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _WRITE_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def _write(descriptor: int, content: bytes) -> None:
    """Not through sys.stderr: a thread that hangs in it holds its lock."""
    while content:
        content = content[os.write(descriptor, content) :]


def _in_collective(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename.endswith(_COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _describe(frame: FrameType | None) -> str:
    if frame is None:
        return "its end"
    return f"{frame.f_code.co_name} ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno})"
