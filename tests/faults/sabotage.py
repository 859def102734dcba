"""``python -m tests.faults.sabotage ARGUMENTS`` is ``python -m train ARGUMENTS``, but one rank goes wrong.

How is said by the environment variable SABOTAGE, JSON: ``{"rank": 1, "place": "data", "call": 5, "fault": "sleep", "notes": FOLDER}``.
Every rank leaves its process id in ``FOLDER/pid_<rank>``, and the code it exits with in ``FOLDER/exit_<rank>``.
"""

from __future__ import annotations

import ctypes
import json
import os
import pkgutil
import signal
import time
from pathlib import Path

# Where: a function of the project, before the ``call``-th call of which (from 1) the fault strikes.
PLACES = {
    "start": "train.build:_open_data",
    "data": "data_pipeline.loader:FaceLoader.__next__",
    "head": "model.partial_fc:PartialFC.prepare",
    "end": "train.report:write_summary",
}


def sleep() -> None:
    time.sleep(1000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold_the_interpreter() -> None:
    """As a library that waits without releasing Python's lock."""
    ctypes.PyDLL(None).sleep(1000)


FAULTS = {fault.__name__: fault for fault in (sleep, stop, kill, hold_the_interpreter)}


def strike(place: str, call: int, fault: str) -> None:
    """Let ``fault`` strike before the ``call``-th call of ``place``."""
    module, _, name = PLACES[place].partition(":")
    *owners, attribute = name.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
    original, calls = getattr(owner, attribute), iter(range(1, 1_000_000))

    def sabotaged(*args, **kwargs):
        if next(calls) == call:
            FAULTS[fault]()
        return original(*args, **kwargs)

    setattr(owner, attribute, sabotaged)


def main() -> None:
    from train.__main__ import main as train

    plan, rank = json.loads(os.environ["SABOTAGE"]), int(os.environ["RANK"])
    notes = Path(plan["notes"])
    (notes / f"pid_{rank}").write_text(str(os.getpid()))
    leave = os._exit
    os._exit = lambda code: ((notes / f"exit_{rank}").write_text(str(code)), leave(code))
    if rank == plan["rank"]:
        strike(plan["place"], plan["call"], plan["fault"])
    train()


if __name__ == "__main__":
    main()
