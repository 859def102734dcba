"""Trials of ``train tune`` that hang, die or run out of memory, and sweeps that are stopped: nothing is left but what was measured."""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training import ROOT
from train.processes import ProcessStat
from train.tune_process import FAILED, OUT_OF_MEMORY, TIMED_OUT, run_trial
from train.tune_settings import Settings, open_workload

SETTINGS = Settings(64, 1, "bf16", checkpointing=False, overlap=True)
LIMIT_S = 240


def trial(folder, fault, timeout_s=60.0):
    overrides = ("data.path=d", "output=o", f"fault={fault}")
    recipe, ds_config = ROOT / "train/recipes/demo.yaml", ROOT / "ds_configs/zero1_bf16.json"
    workload = open_workload(recipe, overrides[:2], ds_config, None, 1, "cpu", window_steps=1, windows=1)
    workload = replace(workload, overrides=overrides)  # the recipe knows no fault
    return run_trial(workload, SETTINGS, folder, timeout_s, "tests.faults.tune_ranks")


def alive(pid: int) -> bool:
    try:
        return ProcessStat.of(pid).state != "Z"
    except OSError:
        return False


@pytest.mark.fault("a trial of train tune hangs", "ended with all its processes; the sweep goes on")
def test_a_trial_that_hangs_is_ended_with_all_its_processes(tmp_path):
    outcome = trial(tmp_path / "trial", "hang", timeout_s=5.0)
    assert outcome.status == TIMED_OUT
    assert "not done after 5 s (--timeout)" in outcome.reason
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", (tmp_path / "trial/log.txt").read_text())]
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.fault("a trial of train tune runs out of memory", "noted as such; the sweep goes on")
def test_a_trial_without_memory_is_noted_as_such(tmp_path):
    outcome = trial(tmp_path / "trial", "memory")
    assert outcome.status == OUT_OF_MEMORY
    assert "32.0 PiB" in outcome.reason


@pytest.mark.fault("SIGKILL of a rank of a trial of train tune", "noted as failed, and not as out of memory")
def test_a_trial_that_something_killed_is_not_taken_for_one_without_memory(tmp_path):
    outcome = trial(tmp_path / "trial", "kill")
    assert outcome.status == FAILED
    assert outcome.reason.startswith("a rank was ended by SIGKILL; the kernel counts no process that it ended to get memory")


@pytest.fixture
def sweep(shards, tmp_path):
    """Starts ``train tune`` on two ranks and 2 real trials; whatever it started is gone after the test."""
    output, started = tmp_path / "out", []

    def start():
        command = [sys.executable, "-m", "train", "tune", "--config", "train/recipes/demo.yaml", "--ranks", "2", "--output", str(output)]
        command += ["--deepspeed_config", "ds_configs/zero1_fp32.json", "--micro-batch", "4,8", "--zero", "1", "--checkpointing", "off"]
        command += ["--overlap", "on", "--windows", "1", "--window-steps", "1", "--repeats", "0", f"data.path={shards}"]
        command += ["batch.micro_batch_size=8"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start, output
    for process in started:
        process.kill()
        process.communicate()
    for pid in trial_processes(output):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def trial_processes(output) -> list[int]:
    """Of the trials below ``output``, launchers and ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "train.tune_trial" in words and str(output) in words and alive(int(folder.name)):
            found.append(int(folder.name))
    return found


def wait_until(condition, process=None):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def statuses(output):
    with (output / "results.csv").open() as file:
        return [row["status"] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # five starts of two ranks
@pytest.mark.fault("Ctrl-C, SIGTERM and SIGKILL of train tune", "no process left; the sweep goes on with what is missing")
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on(sweep):
    start, output = sweep
    process = start()
    wait_until(lambda: (output / "results.csv").exists() and len(trial_processes(output)) == 4, process)  # the second trial
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert trial_processes(output) == []
    assert "results.csv has 1 measured; the same command goes on from there" in stderr
    assert " 1 " in stdout.rpartition("images/s")[2]  # the ranking so far

    process = start()
    wait_until(lambda: len(trial_processes(output)) == 4, process)
    process.terminate()
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert trial_processes(output) == []

    process = start()
    wait_until(lambda: len(trial_processes(output)) == 4, process)
    process.kill()
    process.communicate(timeout=LIMIT_S)
    wait_until(lambda: trial_processes(output) == [])  # the ranks miss their launchers

    process = start()
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, stderr
    assert "2 settings: 1 to measure, 0 refused, 1 known from before" in stdout
    assert statuses(output) == ["measured"] * 2
    assert {path.name for path in output.iterdir()} >= {"results.csv", "best_ds_config.json", "best.txt"}
