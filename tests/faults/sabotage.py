"""``python -m tests.faults.sabotage ARGUMENTS`` is ``python -m train ARGUMENTS``, but a rank goes wrong.

How is said by the environment variable SABOTAGE, JSON: ``{"rank": 1, "place": "data", "call": 5, "fault": "sleep", "notes": FOLDER}``; for
``rank`` null is none and "all" every one, for ``call`` "every" is each. Every rank leaves its process id in ``FOLDER/pid_<rank>``, the code
it exits with in ``FOLDER/exit_<rank>``, and ``FOLDER/struck_<rank>`` when the fault strikes. ``FOLDER/run`` is the run's output.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Where: a function of the project, before the ``call``-th call of which (from 1) the fault strikes.
PLACES = {
    "start": "train.build:_open_data",
    "data": "data_pipeline.loader:FaceLoader.__next__",
    "head": "model.partial_fc:PartialFC.prepare",
    "stage": "train.run:Run.enter_stage",
    "replicas": "train.run:Run.check_replicas",
    "write": "train.checkpoint_folder:HashedFile.write",
    "commit": "train.checkpoint_folder:CheckpointFolder.commit",
    "delete": "train.checkpoint_folder:delete",
    "end": "train.report:write_summary",
}


def sleep(*_: object) -> None:
    time.sleep(1000)


def nap(*_: object) -> None:
    time.sleep(0.25)


def nap_long(*_: object) -> None:
    time.sleep(3)


def stop(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold_the_interpreter(*_: object) -> None:
    """As a library that waits without releasing Python's lock, undisturbed by signals."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(1000)


def fail_io(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fill_the_disk(*_: object) -> None:
    """That the output is on."""
    with contextlib.suppress(OSError), Path(json.loads(os.environ["SABOTAGE"])["notes"], "run/filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(2**12)):
            pass


def flip_a_bit(run) -> None:
    run.engine.module.pos_embed.data.view(-1)[-1:].view(torch.uint8)[0] ^= 1


FAULTS = {fault.__name__: fault for fault in (sleep, nap, nap_long, stop, kill, hold_the_interpreter, fail_io, fill_the_disk, flip_a_bit)}


def strike(place: str, call: int | str, fault: str, note: Callable[[], None]) -> None:
    """Let ``fault`` strike before the ``call``-th call of ``place``, or before every one."""
    module, _, name = PLACES[place].partition(":")
    *owners, attribute = name.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
    original, calls = getattr(owner, attribute), iter(range(1, 1_000_000))

    def sabotaged(*args, **kwargs):
        if next(calls) == call or call == "every":
            note()
            FAULTS[fault](*args)
        return original(*args, **kwargs)

    setattr(owner, attribute, sabotaged)


def main() -> None:
    from train.__main__ import main as train

    plan, rank = json.loads(os.environ["SABOTAGE"]), int(os.environ.get("RANK", 0))
    notes = Path(plan["notes"])
    (notes / f"pid_{rank}").write_text(str(os.getpid()))
    leave = os._exit
    os._exit = lambda code: ((notes / f"exit_{rank}").write_text(str(code)), leave(code))
    if plan["rank"] in (rank, "all"):
        strike(plan["place"], plan["call"], plan["fault"], (notes / f"struck_{rank}").touch)
    train()
    sys.stdout.flush()
    (notes / f"exit_{rank}").write_text("0")


if __name__ == "__main__":
    main()
