"""One trial of ``train tune``: processes of its own, started, watched, ended, and what they measured or why they did not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from train.metrics import LOG
from train.processes import end_group
from train.report import SUMMARY
from train.tune_settings import Settings, Workload
from train.tune_trial import peak_file

MEASURED, REFUSED, OUT_OF_MEMORY, TIMED_OUT, FAILED, SKIPPED = "measured", "refused", "out of memory", "timed out", "failed", "skipped"

# torch on both kinds of device, CUDA, NCCL, DALI, Python, C++.
_NO_MEMORY = re.compile(
    r".*(out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory|MemoryError\b|bad_alloc).*", re.IGNORECASE
)
_EXIT_CODE = re.compile(r"exits with return code = (-?\d+)")  # of the rank that failed, as DeepSpeed's launcher tells it


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    status: str  # MEASURED, REFUSED, ...
    reason: str = ""  # of every status but MEASURED
    images_per_second: tuple[float, ...] = ()  # over all ranks, of each window that counts
    peak_bytes: int | None = None  # of the rank with the most
    seconds: float = 0.0  # from start to end, loading and saving included

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.images_per_second)


def run_trial(workload: Workload, settings: Settings, folder: Path, timeout_s: float, module: str = "train.tune_trial") -> Outcome:
    """Train these settings in ``folder``, which is made anew; of it the log stays, and the run's own log and configs.

    However this ends, by an exception too, no process of the trial is left.

    Args:
        timeout_s: a trial that takes longer is ended.
        module: what the ranks run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "trial_ds_config.json").write_text(json.dumps(workload.deepspeed_config(settings), indent=1) + "\n")
    output, log = folder / "run", folder / "log.txt"
    kills, begin, ended = _oom_kills(), time.monotonic(), True
    with log.open("w") as file:
        # A session of its own: Ctrl-C reaches this process alone, which then ends all of the trial's. If this one is killed, the ranks
        # notice by themselves: with --deepspeed_config on its command line it is a launcher to train.stop.
        process = subprocess.Popen(
            trial_command(workload, settings, folder, module),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            end_group(process.pid)  # ranks may outlive their launcher
            process.wait()
    seconds = time.monotonic() - begin
    text = log.read_text(errors="replace")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    if not ended:
        return Outcome(TIMED_OUT, f"not done after {timeout_s:g} s (--timeout); {log} tells how far it came", seconds=seconds)
    if not (output / SUMMARY).exists():  # the launcher's exit code may be 0 where a rank was killed
        status, reason = why_failed(text, process.returncode, _oom_kills() - kills)
        return Outcome(status, f"{reason} ({log})", seconds=seconds)
    windows = read_windows(output / LOG)
    if not windows:
        return Outcome(FAILED, f"every window that counts has skipped steps ({log})", seconds=seconds)
    peaks = [json.loads(peak_file(folder, rank).read_text())["bytes"] for rank in range(workload.world_size)]
    return Outcome(MEASURED, "", windows, max(peaks), seconds)


def trial_command(workload: Workload, settings: Settings, folder: Path, module: str) -> list[str]:
    """Ranks under DeepSpeed's launcher, one rank without it."""
    launcher = [sys.executable, "-m"]
    if workload.world_size > 1:
        launcher += ["deepspeed.launcher.runner", "--num_gpus", str(workload.world_size), "--master_port", str(_free_port())]
        launcher += ["--no_local_rank", "--module"]
    configs = ["--config", str(workload.recipe.resolve()), "--deepspeed_config", str((folder / "trial_ds_config.json").resolve())]
    return [*launcher, module, str(folder.resolve()), *configs, *workload.trial_overrides(settings, (folder / "run").resolve())]


def read_windows(metrics: Path) -> tuple[float, ...]:
    """Images per second of every log window but the first one, which warms up, and those with a skipped step, which are shorter.

    On a GPU a line tells the time of the window before it, and the first line none.
    """
    windows = [json.loads(line) for line in metrics.read_text().splitlines()]
    timed = [window for window in windows if window["step_seconds"]][1:]
    return tuple(
        window["images"] / window["steps"] / window["step_seconds"]["total"]
        for window in timed
        if window["outcomes"]["applied"] == window["steps"]
    )


def why_failed(log: str, returncode: int, oom_kills: int) -> tuple[str, str]:
    """Status and reason of a trial that did not come to its end.

    Args:
        returncode: of the process that was started.
        oom_kills: processes that the kernel ended meanwhile to get memory.
    """
    codes = [int(code) for code in _EXIT_CODE.findall(log)] or [returncode]
    if oom_kills:
        return OUT_OF_MEMORY, "the kernel ended a process of this host to get memory"
    if found := _NO_MEMORY.search(log):
        return OUT_OF_MEMORY, _shortened(found.group())
    if -signal.SIGKILL in codes:
        return FAILED, "a rank was ended by SIGKILL; the kernel counts no process that it ended to get memory"
    errors = [line for line in log.splitlines() if re.match(r"error: |\w*(Error|Exception)\b.*: ", line)]
    return FAILED, _shortened(errors[-1]) if errors else f"exit code {codes[0]}"


def _shortened(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def _oom_kills() -> int:
    """Processes of this host that the kernel has ended for want of memory since it started, those of a container's limit included."""
    found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return int(found.group(1)) if found else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
