import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from data_pipeline.errors import DataError
from data_pipeline.workers import run_jobs
from tests.unit.processes import ROOT, children, gone, wait_until


def square(job, count):
    count(1)
    count(2)
    return job, job * job, os.getpid()


def fail_at_three(job, count):
    if job == 3:
        raise DataError("job 3 is bad")
    return job


def fail_for_lack_of_a_file(job, count):
    os.stat("/nowhere/at all")


def die_at_three(job, count):
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


class Marking:
    """Writes its process id into a folder, and waits for ever."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, job, count):
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)


def nothing(*_):
    pass


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_done_once_and_counted(workers):
    counted = []
    results = list(run_jobs(square, range(20), workers, counted.append))
    assert sorted(result[:2] for result in results) == [(job, job * job) for job in range(20)]
    assert sorted(counted) == [1] * 20 + [2] * 20
    processes = {pid for _, _, pid in results}
    assert (os.getpid() in processes) == (workers == 1)
    assert 1 <= len(processes) <= workers


def test_more_workers_than_jobs_are_no_harm():
    assert list(run_jobs(fail_at_three, [1], 2, nothing)) == [1]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_job_raises_is_raised_here_and_ends_the_others(workers):
    with pytest.raises(DataError, match="job 3 is bad"):
        list(run_jobs(fail_at_three, range(1000), workers, nothing))
    assert not children(os.getpid(), "spawn_main")
    with pytest.raises(FileNotFoundError, match="/nowhere/at all") as caught:
        list(run_jobs(fail_for_lack_of_a_file, range(2), workers, nothing))
    assert workers == 1 or "fail_for_lack_of_a_file" in caught.value.__notes__[0]


def test_a_worker_that_is_killed_is_an_error():
    with pytest.raises(DataError, match=r"a worker process died \(exit code -9; .* memory runs out\): use fewer workers"):
        list(run_jobs(die_at_three, range(1000), 2, nothing))
    assert not children(os.getpid(), "spawn_main")


def test_workers_end_when_the_caller_stops(tmp_path):
    with closing(run_jobs(square, iter(int, 1), 2, nothing)) as results:
        processes = {next(results)[2] for _ in range(50)}
    assert all(gone(pid) for pid in processes)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = (
        "from pathlib import Path; from data_pipeline.workers import run_jobs; from tests.unit.test_workers import Marking, nothing\n"
        f"if __name__ == '__main__': list(run_jobs(Marking(Path({str(tmp_path)!r})), range(2), 2, nothing))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, parent)
    parent.kill()
    wait_until(lambda: all(gone(int(file.name)) for file in tmp_path.iterdir()))
    assert parent.communicate()[1] == ""


def test_ctrl_c_and_sigterm_do_not_reach_the_workers(tmp_path):
    """The parent ends them: they must not die before, with a message each."""
    script = (
        "from pathlib import Path; from data_pipeline.workers import run_jobs; from tests.unit.test_workers import Marking, nothing\n"
        "if __name__ == '__main__':\n"
        "    import signal; signal.signal(signal.SIGINT, nothing); signal.signal(signal.SIGTERM, nothing)\n"
        f"    list(run_jobs(Marking(Path({str(tmp_path)!r})), range(2), 2, nothing))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, parent)
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert not any(gone(int(file.name)) for file in tmp_path.iterdir())
    os.killpg(parent.pid, signal.SIGKILL)
    assert parent.communicate()[1] == ""
