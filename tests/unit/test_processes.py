"""Processes of this host: when a group of them is gone."""

import subprocess
import sys
import time
from pathlib import Path

from train.processes import ProcessStat, end_group

# Two processes that hold much memory, which the kernel takes back before they are gone; the second one outlives its parent.
TWO = "import os, time; block = bytearray(300_000_000); print(os.getpid(), flush=True); os.fork() or time.sleep(60); time.sleep(60)"


def living(group: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = ProcessStat.of(int(folder.name))
        except OSError:
            continue
        found += [int(folder.name)] if stat.group == group and stat.state != "Z" else []
    return found


def test_a_group_that_was_ended_has_no_process_left_that_is_still_on_its_way_out():
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", TWO], stdout=subprocess.PIPE, start_new_session=True, text=True)
        assert int(process.stdout.readline()) == process.pid
        while len(living(process.pid)) < 2:
            time.sleep(0.01)
        end_group(process.pid)
        assert living(process.pid) == []
        process.wait()
        end_group(process.pid)  # nobody is there any more
        process.stdout.close()


def test_a_process_is_described_as_the_kernel_has_it():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert ProcessStat.of(process.pid).group == process.pid
    end_group(process.pid)
    assert ProcessStat.of(process.pid).state == "Z"  # nobody has waited for it yet
    process.wait()
