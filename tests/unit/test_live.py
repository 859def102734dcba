"""The live view and the log lines that stand in for it."""

import fcntl
import io
import re
import struct
import termios

import pytest

from tests.screen import Screen
from tests.unit.test_metrics import record
from train.live import LiveView, LogLines, Standing, open_progress, render, view
from train.run_log import LogEntry

FULL = {
    "step": 120,
    "stage_name": "early",
    "epoch": 3.25,
    "learning_rate": 1e-3,
    "loss": 3.2,
    "loss_maximum": 4.1,
    "target_cosine": 0.42,
    "gradient_norm": 1.5,
    "outcomes": {"applied": 8, "spike": 1, "fp16 overflow": 1},
    "images_per_second": 4431.0,
    "utilization": 0.41,
    "memory": {"used": 61e9, "peak": 70e9},
    "step_seconds": {"forward": 0.25, "data_wait": 0.0, "backward": 0.5, "comm": 0.25, "total": 1.0},
    "remaining_seconds": 100.0,
    "checkpoint_step": 100.0,
    "checkpoint_blocked_seconds": 0.061,
    "checkpoint_write_seconds": 1.3,
}


def shown(values, now=1000.0, columns=110):
    standing = Standing(step=120, total_steps=370, stepped=now, entry=LogEntry(values) if values else None, logged=990.0)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in render(view("runs/demo", standing, now), columns)]


def test_the_view_says_what_a_record_knows():
    title, bar, *rows = shown(FULL)
    assert "runs/demo" in title
    assert bar.startswith("step       ━")
    assert bar.endswith("120/370  32%  ETA 1:30")  # ten seconds after the window
    assert rows == [
        "stage      early  epoch 3.25  lr 1.00e-03",
        "loss       3.2000  highest 4.1000  target cosine 0.420  |g| 1.5  skipped 2",
        "speed      4,431 images/s  MFU 41%",
        "memory     used 61.0 GB  peak 70.0 GB",
        "time       forward 25%  backward 50%  comm 25%",
        "checkpoint step 100  held up 0.06 s  written in 1.3 s",
    ]


def test_what_is_not_known_is_left_out():
    older = {"step": 120, "stage_name": "early", "loss": None, "skipped_steps": 0, "utilization": None, "images_per_second": 12.0}
    assert shown(older)[2:] == ["stage      early", "loss", "speed      12 images/s"]
    assert len(shown(None)) == 2


def test_a_step_that_takes_long_is_shown_to_be_under_way():
    standing = Standing(step=4, total_steps=9, stepped=100.0)
    lines = render(view("runs/demo", standing, now=115.0), 80)
    assert any("waiting" in line and "step 5 since 0:15" in line for line in lines)


@pytest.mark.parametrize("columns", [1, 20, 40, 80, 200])
def test_no_line_is_longer_than_the_terminal_is_wide(columns):
    assert max(map(len, shown(FULL, columns=columns))) <= columns


@pytest.fixture
def screen():
    screen = Screen(columns=160, rows=24)
    yield screen
    screen.close()


def say_to(screen):
    return lambda text: open(screen.descriptor, "w", closefd=False).write(text + "\n")


def test_what_is_said_stays_above_the_view_which_leaves_its_last_line_behind(screen):
    live = LiveView("runs/demo", say_to(screen), screen.descriptor, interval_s=0.01)
    live.step(11, total_steps=16)
    live.window(record(step=11, step_seconds={}))
    screen.wait_for(lambda: any("11/16" in line for line in screen.rows()))
    for number in range(40):
        say_to(screen)(f"said {number}")
    live.step(12, total_steps=16)
    screen.wait_for(lambda: any("12/16" in line for line in screen.rows()))
    live.close()
    live.close()
    *said, last = screen.everything()
    assert said == [f"said {number}" for number in range(40)]
    assert last.startswith("step 11/16  stable")
    assert screen.scrolls_whole


def test_a_view_of_a_run_that_took_no_step_says_nothing(screen):
    live = LiveView("runs/demo", say_to(screen), screen.descriptor)
    live.close()
    assert screen.everything() == []


@pytest.mark.parametrize(
    ("live", "terminal", "kind", "expected"),
    [
        (True, True, "xterm-256color", LiveView),
        (False, True, "xterm-256color", LogLines),
        (True, False, "xterm-256color", LogLines),
        (True, True, "dumb", LogLines),
    ],
)
def test_lines_are_logged_where_no_view_is_wanted_or_none_can_be(live, terminal, kind, expected, screen, monkeypatch):
    monkeypatch.setenv("TERM", kind)
    with open(screen.descriptor, "w", closefd=False) if terminal else io.StringIO() as stream:
        assert type(open_progress(live, "runs/demo", print, stream)) is expected


@pytest.mark.parametrize("rows", [0, 9])
def test_lines_are_logged_where_the_terminal_is_too_small(rows, screen, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with open(screen.descriptor, "w", closefd=False) as stream:
        assert isinstance(open_progress(True, "runs/demo", print, stream), LiveView)
        fcntl.ioctl(screen.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 0, 0))
        assert isinstance(open_progress(True, "runs/demo", print, stream), LogLines)


def test_a_line_is_logged_for_every_window():
    lines = []
    progress = LogLines(lines.append)
    for step in (1, 2):
        progress.step(step, total_steps=16)
        progress.window(record(step=step, step_seconds={}))
    progress.close()
    assert [line.split("  stable")[0] for line in lines] == ["step  1/16", "step  2/16"]
