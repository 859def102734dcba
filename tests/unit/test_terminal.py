"""Rows that are kept at the bottom of a terminal, seen through a terminal emulator."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.screen import Screen
from tests.training import ROOT
from train.terminal import ReservedRows

STATUS = ["status one", "status two", "status three"]


@pytest.fixture
def screen():
    screen = Screen(columns=40, rows=12)
    yield screen
    screen.close()


def write_as_another_process(screen, text):
    subprocess.run(["printf", "%s\\n", text], stdout=screen.descriptor, check=True)


def test_lines_of_other_processes_scroll_above_the_rows_and_none_is_lost(screen):
    rows = ReservedRows(screen.descriptor)
    for number in range(20):
        write_as_another_process(screen, f"line {number}")
        rows.show([*STATUS[:2], f"status {number}"])
    assert screen.rows()[-3:] == [*STATUS[:2], "status 19"]
    assert [line for line in screen.everything() if not line.startswith("status")] == [f"line {number}" for number in range(20)]
    rows.release()


def test_released_rows_are_empty_and_the_next_line_follows_the_last_one(screen):
    rows = ReservedRows(screen.descriptor)
    write_as_another_process(screen, "before")
    rows.show(STATUS)
    rows.release()
    rows.release()
    write_as_another_process(screen, "after")
    assert screen.rows() == ["before", "after", *[""] * 10]
    assert screen.scrolls_whole


def test_rows_follow_the_size_of_the_terminal_and_their_own_number(screen):
    rows = ReservedRows(screen.descriptor)
    write_as_another_process(screen, "before")
    rows.show(STATUS)
    screen.rows()
    screen.resize(40, 16)
    rows.show(STATUS)
    assert screen.rows() == ["before", *[""] * 12, *STATUS]
    rows.show(STATUS[:1])
    assert screen.rows() == ["before", *[""] * 14, STATUS[0]]
    rows.release()


def test_half_of_a_small_terminal_is_left_to_others(screen):
    screen.resize(40, 4)
    rows = ReservedRows(screen.descriptor)
    rows.show(STATUS)
    assert screen.rows() == ["", "", *STATUS[:2]]
    rows.release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_rows_are_given_back_when_the_process_is_killed(number, screen):
    program = f"""
        import time
        from train.terminal import ReservedRows

        rows = ReservedRows(1)
        rows.show({STATUS})
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=screen.descriptor)
    screen.wait_for(lambda: screen.rows()[-1] == STATUS[-1])
    assert not screen.scrolls_whole
    os.kill(process.pid, number)
    process.wait()
    screen.wait_for(lambda: not any(screen.rows()))
    assert screen.scrolls_whole
