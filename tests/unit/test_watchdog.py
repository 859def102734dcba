"""Who is blamed, from what the ranks last said; and when a rank alone raises the alarm."""

import os
import threading
import time

import pytest
import torch

import train.watchdog
from train.config import WatchdogConfig
from train.dist import Ranks
from train.pulse import Process, Pulse
from train.verdict import ranks_text, silent_ranks, verdict, why_silent
from train.watchdog import HUNG, Watchdog

CONFIG = WatchdogConfig(data_s=30, step_s=60)
HERE = Process.current()


def pulse(rank, phase, entered, seconds, *, waiting=False, alarm=True, step=12, stopped=0.0):
    return Pulse(rank, phase, step, entered, seconds, waiting, "f (a/b.py:7)", alarm, stopped, HERE)


@pytest.mark.parametrize(
    ("pulses", "silent", "expected"),
    [
        pytest.param(
            [pulse(0, "head", 51, 31.0, waiting=True), pulse(1, "data", 50, 31.2)],
            {},
            "rank 1 is stuck in phase data after step 12, for 31 s, at f (a/b.py:7); rank 0 is in phase head, for 31 s; "
            "watchdog.data_s allows 30 s",
            id="the one that is behind",
        ),
        pytest.param(
            [pulse(0, "head", 51, 61.0, waiting=True), pulse(1, "head", 51, 60.5), pulse(2, "head", 51, 61.0, waiting=True)],
            {},
            "rank 1 is stuck in phase head after step 12, for 60 s, at f (a/b.py:7); ranks 0, 2 are in phase head, for 61 s; "
            "watchdog.step_s allows 60 s",
            id="the one that waits for nobody",
        ),
        pytest.param(
            [pulse(0, "head", 51, 61.0, waiting=True), pulse(1, "head", 51, 61.0, waiting=True)],
            {},
            "ranks 0, 1 are stuck in phase head after step 12, for 61 s, at f (a/b.py:7), waiting for each other; "
            "watchdog.step_s allows 60 s",
            id="a network",
        ),
        pytest.param(
            [pulse(0, "data", 50, 31.0), pulse(1, "data", 50, 31.0), pulse(2, "head", 51, 31.0)],
            {},
            "ranks 0, 1 are stuck in phase data after step 12, for 31 s, at f (a/b.py:7); rank 2 is in phase head, for 31 s; "
            "watchdog.data_s allows 30 s",
            id="two",
        ),
        pytest.param(
            [pulse(0, "head", 51, 61.0, waiting=True), pulse(1, "head", 51, 0.2, alarm=False), pulse(2, "data", 50, 1.0)],
            {1: "it is stopped"},
            "rank 1 is stuck: it is stopped; last seen in phase head after step 12; rank 0 is in phase head, for 61 s; "
            "rank 2 is in phase data, for 1 s; watchdog.step_s allows 60 s",
            id="one that does not answer, whoever is behind",
        ),
        pytest.param(
            [
                pulse(0, "head", 51, 61.0, waiting=True),
                pulse(1, "forward", 52, 0.1, stopped=62.4),
                pulse(2, "head", 51, 61.0, waiting=True),
            ],
            {},
            "rank 1 is stuck: its process was stopped (SIGSTOP, or a suspended job) for 62 s; ranks 0, 2 are in phase head, for 61 s; "
            "watchdog.step_s allows 60 s",
            id="one that was stopped, wherever it is since it was woken",
        ),
        pytest.param(
            [pulse(0, "start", 0, 1801.0, step=0)],
            {},
            "rank 0 is stuck in phase start, for 1801 s, at f (a/b.py:7); watchdog.start_s allows 1800 s",
            id="alone",
        ),
    ],
)
def test_the_verdict_names_who_holds_the_others_up(pulses, silent, expected):
    assert verdict({pulse.rank: pulse for pulse in pulses}, silent, CONFIG) == expected


def answers(*alarms):
    return {rank: pulse(rank, "head", 1, 1.0, alarm=alarm) for rank, alarm in enumerate(alarms)}


def test_ranks_that_do_not_answer_are_silent_and_the_keeper_alone_where_the_store_is_not_heard():
    assert silent_ranks(answers(True, True, True), me=1) == []
    assert silent_ranks(answers(True, True, False), me=1) == [2]
    assert silent_ranks(answers(False, False, False), me=1) == [0]
    assert silent_ranks(answers(False, True, False), me=0) == [2]


def test_ranks_are_listed_briefly():
    assert [ranks_text(ranks) for ranks in ([3], [1, 0], [5, 0, 1, 2, 9, 8, 7])] == [
        "rank 3 is", "ranks 0, 1 are", "ranks 0 to 2, 5, 7 to 9 are",
    ]  # fmt: skip


def test_a_process_of_this_node_is_looked_at_and_one_of_another_is_not():
    assert "no Python in it" in why_silent(HERE, HERE.node)
    gone = Process(HERE.host, HERE.node, HERE.pid, HERE.started + 1)  # its number is that of another by now
    assert why_silent(gone, HERE.node) == "its process has died"
    assert why_silent(HERE, "another") == f"its process on {HERE.host} is stopped or has died, or {HERE.host} cannot be reached"


def test_the_deadline_of_what_lies_between_the_phases_is_that_of_a_step():
    deadlines = {phase: CONFIG.deadline(phase) for phase in ("start", "data", "head", "loop", "checkpoint", "end")}
    assert deadlines == {"start": 1800, "data": 30, "head": 60, "loop": 60, "checkpoint": 1800, "end": 1800}
    assert CONFIG.group_timeout.total_seconds() > max(deadlines.values())


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Makes a watchdog of a single rank, in this process, which an alarm does not end: ``exits`` gets the exit codes."""
    exits = []
    monkeypatch.setattr(train.watchdog.os, "_exit", exits.append)
    monkeypatch.setattr(train.watchdog, "_ignore_sigterm", lambda: None)

    def build(**deadlines):
        config = WatchdogConfig(**{"start_s": 20, "data_s": 10, "step_s": 20, **deadlines})
        return Watchdog(config, Ranks(0, 0, 1, 1, torch.device("cpu")), tmp_path / "stacks"), exits

    return build


def wait_for(condition, limit_s):
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_phase_that_outlives_its_deadline_ends_the_process(watch, tmp_path, capfd):
    watchdog, exits = watch(data_s=0.3)
    with watchdog:
        watchdog.enter("data", 4)
        assert wait_for(lambda: exits, 10)
    assert exits[0] == HUNG
    told = capfd.readouterr().err
    assert "error: rank 0 is stuck in phase data after step 4, for 0 s, at wait_for" in told
    saved = (tmp_path / "stacks/rank_00000.txt").read_text()
    assert saved in told
    assert "in test_a_phase_that_outlives_its_deadline_ends_the_process" in saved


def test_a_run_that_goes_on_is_left_alone(watch, tmp_path, capfd):
    """Each phase stays within its deadline; together they take longer."""
    watchdog, exits = watch(start_s=0.5, data_s=0.5, step_s=0.6)
    with watchdog:
        for step in range(12):
            for phase in ("data", "head"):
                watchdog.enter(phase, step)
                time.sleep(0.05)
    assert not exits
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "stacks").exists()


def test_time_in_which_the_whole_process_was_stopped_does_not_count(watch, monkeypatch):
    watchdog, exits = watch()
    clock, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(train.watchdog.time, "monotonic", lambda: clock() + ahead[0])
    with watchdog:
        watchdog.enter("data", 0)
        time.sleep(0.7)
        ahead[0] = 3600.0
        time.sleep(1.2)
    assert not exits


def test_a_file_system_that_hangs_does_not_keep_the_process(watch, tmp_path, capfd):
    watchdog, exits = watch(data_s=0.3)
    (tmp_path / "stacks").mkdir()
    fifo = tmp_path / "stacks/rank_00000.txt"
    os.mkfifo(fifo)  # without a reader opening it for writing hangs
    with watchdog:
        watchdog.enter("data", 0)
        assert wait_for(lambda: exits, 10)
    assert "error: rank 0 is stuck in phase data" in capfd.readouterr().err
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # lets the threads go
    assert wait_for(lambda: not [thread for thread in threading.enumerate() if "attempt" in thread.name], 5)
    os.close(descriptor)
