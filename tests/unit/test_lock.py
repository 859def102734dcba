"""Two runs on one output: the second is refused by name, a dead one's place is taken, with and without locks in the file system."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.training import ROOT
from train.lock import LockError, OutputLock, Owner, writer_of

HOLD = "import sys, time; from pathlib import Path; from train.lock import OutputLock; \
lock = OutputLock(Path(sys.argv[1]), print); print('locked', flush=True); time.sleep(100)"


@pytest.fixture
def said():
    return []


@pytest.fixture(params=["flock", "no flock"])
def file_system(request, monkeypatch):
    if request.param == "no flock":

        def flock(file, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def write_owner(folder, **changes):
    owner = {**vars(Owner.of_this_process()), **changes}
    (folder / ".lock").write_text(json.dumps(owner))
    return Owner(**owner)


def test_a_living_owner_is_named_and_keeps_the_lock(file_system, holder, tmp_path, said):
    content = (tmp_path / ".lock").read_text()
    who = rf"\(pid {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    expected = rf"^{re.escape(str(tmp_path))}: another run is writing here {who}; end it first, or choose another output$"
    for _ in range(2):
        with pytest.raises(LockError, match=expected):
            OutputLock(tmp_path, said.append)
    assert (tmp_path / ".lock").read_text() == content
    assert Owner.parse(content).start_ticks > Owner.of_this_process().start_ticks
    assert said == []


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_owner_loses_the_lock_and_is_named(file_system, reaped, holder, tmp_path, said):
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    OutputLock(tmp_path, said.append).close()
    (line,) = said
    assert line.startswith(f"{tmp_path}: taken over from a run that was stopped (pid {holder.pid} on ")


def test_an_owner_that_came_to_its_end_is_not_mentioned(file_system, tmp_path, said):
    for _ in range(2):
        OutputLock(tmp_path / "new" / "folder", said.append).close()
    assert said == []


def test_the_same_process_is_refused_while_it_holds_the_lock(file_system, tmp_path, said):
    lock = OutputLock(tmp_path, said.append)
    with pytest.raises(LockError, match=f"pid {os.getpid()} on"):
        OutputLock(tmp_path, said.append)
    lock.close()
    OutputLock(tmp_path, said.append).close()


def test_another_process_that_has_got_the_pid_is_not_the_owner(file_system, tmp_path, said):
    owner = write_owner(tmp_path, start_ticks=Owner.of_this_process().start_ticks - 1)
    OutputLock(tmp_path, said.append).close()
    assert said == [f"{tmp_path}: taken over from a run that was stopped ({owner})"]


def test_without_locks_an_owner_on_another_host_may_be_alive(file_system, tmp_path, said):
    """With locks it is not: the kernel has just said so."""
    owner = write_owner(tmp_path, host="elsewhere")
    if file_system == "flock":
        OutputLock(tmp_path, said.append).close()
        assert said == [f"{tmp_path}: taken over from a run that was stopped ({owner})"]
        return
    expected = f"(pid {os.getpid()} on elsewhere since {owner.since}); end it first, or choose another output. This file system has no "
    with pytest.raises(LockError, match=re.escape(expected) + f"locks: if that process is gone, remove {tmp_path}/.lock$"):
        OutputLock(tmp_path, said.append)
    assert Owner.parse((tmp_path / ".lock").read_text()) == owner


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"null", b'{"host": "h"}', b'{"host": "h", "pid": "x"', b"7"])
def test_a_file_that_names_no_owner_is_nobodys(file_system, content, tmp_path, said):
    (tmp_path / ".lock").write_bytes(content)
    OutputLock(tmp_path, said.append).close()
    assert said == []
    assert (tmp_path / ".lock").read_bytes() == b""


def test_an_owner_that_has_not_written_its_name_yet_still_has_the_lock(tmp_path, said):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockError, match=r"another run is writing here; end it first"):
            OutputLock(tmp_path, said.append)


def test_the_writer_of_an_output_is_told_without_taking_its_place(file_system, holder, tmp_path):
    content = (tmp_path / ".lock").read_text()
    assert writer_of(tmp_path).startswith(f"pid {holder.pid} on {socket.gethostname()} since ")
    assert (tmp_path / ".lock").read_text() == content
    holder.kill()
    holder.wait()
    assert writer_of(tmp_path) is None
    assert writer_of(tmp_path / "elsewhere") is None
    assert not (tmp_path / "elsewhere").exists()


def test_without_locks_a_process_of_another_host_counts_as_a_writer(monkeypatch, tmp_path):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    owner = write_owner(tmp_path, host="another")
    assert writer_of(tmp_path) is None  # the kernel knows of no lock
    monkeypatch.setattr(fcntl, "flock", flock)
    assert writer_of(tmp_path) == str(owner)
