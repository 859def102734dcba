"""A run from the command line to which something happens: two ranks under the launcher, sabotaged, watched, and gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from tests.launch import launch_process
from tests.training import write_recipe
from train.processes import ProcessStat

_LIMIT_S = 120


class Scene:
    """``with Scene(folder, shards) as scene:`` whatever it started is gone after the block. The output is ``folder/run``."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.output, self._shards = folder, folder / "run", shards
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()

    def start(self, sabotage: dict | None = None, *overrides: str, launcher=None, ranks: int = 2, preexec=None, **changes) -> None:
        """Start ranks with a recipe of ``changes``; ``sabotage`` is a plan of tests.faults.sabotage but for its notes."""
        for note in self.folder.glob("*_[0-9]"):
            note.unlink()
        recipe = write_recipe(self.folder / "recipe.yaml", self._shards, self.output, **changes)
        plan = {"rank": None, **(sabotage or {}), "notes": str(self.folder)}
        self._process = launch_process(
            recipe,
            *overrides,
            ranks=ranks,
            launcher=launcher,
            module="tests.faults.sabotage",
            environment={"SABOTAGE": json.dumps(plan)},
            start_new_session=True,
            preexec_fn=preexec,
        )
        self.stdout, self.stderr = [], []
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for lines, stream in ((self.stdout, self._process.stdout), (self.stderr, self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def wait_for_step(self, step: int) -> None:
        """Until the log tells of it."""
        self._wait(lambda: any(line.startswith(f"step {step}/") for line in self.stdout), f"step {step}")

    def wait_for_call(self) -> None:
        """Until the sabotaged call has been reached."""
        self._wait(lambda: any(self.folder.glob("struck_*")), "the sabotaged call")

    def end(self) -> subprocess.CompletedProcess:
        """Wait for the launcher and the ranks, which may outlive it."""
        self._wait(lambda: self._process.poll() is not None, "the launcher's end")
        for reader in self._readers:  # the pipes close with the last process that writes to them
            reader.join(_LIMIT_S)
        return subprocess.CompletedProcess(self._process.args, self._process.returncode, "".join(self.stdout), "".join(self.stderr))

    def finish(self, *overrides: str, **changes) -> subprocess.CompletedProcess:
        """Start (again) without sabotage, and wait for the end."""
        self.start(None, *overrides, **changes)
        return self.end()

    @property
    def launcher(self) -> int:
        return self._process.pid

    @property
    def starter(self) -> int:
        """The launcher's child, parent of the ranks."""
        return ProcessStat.of(self.pid(0)).parent

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid_{rank}").read_text())

    def codes(self) -> dict[int, int]:
        """Exit codes by rank, of those that ended by themselves."""
        return {int(path.name[-1]): int(path.read_text()) for path in sorted(self.folder.glob("exit_*"))}

    def all_gone(self, within_s: float = 5.0) -> bool:
        """Whether no rank is left."""
        end = time.monotonic() + within_s
        while any(Path(f"/proc/{pid}").exists() for pid in self._pids()):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("pid_*")]

    def _wait(self, happened, what: str) -> None:
        end = time.monotonic() + _LIMIT_S
        while not happened():
            over = self._process.poll() is not None and what != "the launcher's end"
            if over or time.monotonic() > end:
                raise AssertionError(f"no sign of {what}:\n{''.join(self.stdout)}\n{''.join(self.stderr)}")
            time.sleep(0.02)
