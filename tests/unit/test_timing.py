"""Parts of steps and uses of a run's time, on clocks under the test's control."""

import threading
import time

import pytest

import train.timing
from train.timing import PARTS, RUN_TIMES, PartTimer, RunTime, Window, _timed

ZERO = dict.fromkeys(PARTS, 0.0)


@pytest.fixture
def host_time(monkeypatch) -> list[float]:
    """The host clock: host_time[0] is now, in seconds."""
    now = [0.0]
    monkeypatch.setattr(train.timing.time, "perf_counter", lambda: now[0])
    return now


def spend(timer: PartTimer, now: list[float], **seconds: float) -> None:
    for name, duration in seconds.items():
        with timer.part(name):
            now[0] += duration


def test_parts_and_what_is_in_none_add_up_to_the_steps(host_time):
    timer = PartTimer("cpu")
    for extra in (0.25, 0.75):
        spend(timer, host_time, data_wait=1.0, forward=2.0)
        spend(timer, host_time, data_wait=3.0, forward=4.0)  # the second micro-batch of the same step
        spend(timer, host_time, optimizer=0.5)
        host_time[0] += extra
        timer.end_step()
    window = timer.window()
    assert window.steps == [10.75, 11.25]
    assert window.parts == {**ZERO, "data_wait": 8.0, "forward": 12.0, "optimizer": 1.0, "other": 1.0}
    assert window.per_step() == {**ZERO, "data_wait": 4.0, "forward": 6.0, "optimizer": 0.5, "other": 0.5, "total": 11.0}


def test_a_part_within_another_is_not_counted_there(host_time):
    timer = PartTimer("cpu")
    with timer.part("backward"):
        host_time[0] += 1.0
        with timer.part("comm"):
            host_time[0] += 5.0
        with timer.part("comm"):
            host_time[0] += 7.0
        host_time[0] += 2.0
    timer.end_step()
    assert timer.window().parts == {**ZERO, "backward": 3.0, "comm": 12.0}


def test_an_exception_within_a_part_leaves_it(host_time):
    timer = PartTimer("cpu")
    with pytest.raises(ZeroDivisionError), timer.part("backward"):
        raise ZeroDivisionError
    spend(timer, host_time, head=1.0)
    timer.end_step()
    assert timer.window().parts == {**ZERO, "head": 1.0}


def test_a_window_forgets_the_one_before_and_begins_where_that_ended(host_time):
    timer = PartTimer("cpu")
    spend(timer, host_time, data_wait=1.0)
    timer.end_step()
    timer.window()
    spend(timer, host_time, checkpoint=4.0)  # between two steps: it holds up the second
    spend(timer, host_time, head=3.0)
    timer.end_step()
    assert timer.window() == Window({**ZERO, "checkpoint": 4.0, "head": 3.0}, [7.0])


def test_what_came_before_the_first_step_is_left_out(host_time):
    timer = PartTimer("cpu")
    spend(timer, host_time, head=9.0)
    timer.restart()
    spend(timer, host_time, head=1.0)
    timer.end_step()
    assert timer.window() == Window({**ZERO, "head": 1.0}, [1.0])


def test_device_events_are_read_one_window_late(host_time, monkeypatch):
    class LateClock(train.timing._HostClock):
        windows_late = 1

    monkeypatch.setattr(train.timing, "_CudaClock", LateClock)
    timer = PartTimer("cuda")
    spend(timer, host_time, forward=2.0)
    timer.end_step()
    assert timer.window() == Window({}, [])
    assert timer.window().per_step() == {**ZERO, "forward": 2.0, "total": 2.0}
    assert timer.window() == Window(ZERO, [])


def test_a_collective_is_timed_where_it_waits(host_time):
    class Work:
        def wait(self):
            host_time[0] += 3.0

        def is_completed(self):
            return True

    def call(asynchronous):
        host_time[0] += 1.0
        return Work() if asynchronous else None

    timer = PartTimer("cpu")
    timed = _timed(call, timer)
    assert timed(False) is None
    work = timed(asynchronous=True)
    host_time[0] += 10.0
    work.wait()
    assert work.is_completed()
    timer.end_step()
    assert timer.window().parts == {**ZERO, "comm": 5.0, "other": 10.0}


def test_the_time_of_a_run_begins_with_its_process_and_every_second_has_one_use():
    now = [1000.0]
    run_time = RunTime(lambda: now[0])
    run_time.lap("start")
    age = run_time.seconds["start"]
    assert 0 < age < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert age == pytest.approx(time.time() - _started(), abs=2.0)
    for kind, seconds in (("train", 5.0), ("checkpoint", 2.0), ("train", 1.0)):
        now[0] += seconds
        run_time.lap(kind)
    now[0] += 4.0
    assert run_time.so_far("repeat") == {**dict.fromkeys(RUN_TIMES, 0.0), "start": age, "train": 6.0, "checkpoint": 2.0, "repeat": 4.0}
    assert run_time.seconds["repeat"] == 0.0


def _started() -> float:
    """Of this process in seconds since 1970, as prometheus_client reads it."""
    from prometheus_client import CollectorRegistry, ProcessCollector

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry.get_sample_value("process_start_time_seconds")


def test_a_timer_takes_parts_of_another_thread_while_its_own_waits(host_time):
    """As hooks of the backward pass on a GPU are."""
    timer = PartTimer("cpu")
    with timer.part("backward"):
        thread = threading.Thread(target=spend, args=(timer, host_time), kwargs={"comm": 2.0})
        thread.start()
        thread.join()
    timer.end_step()
    assert timer.window().parts == {**ZERO, "comm": 2.0}


@pytest.mark.gpu
def test_cuda_events_time_the_device():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: that events measure device time was not checked")
    timer = PartTimer("cuda")
    with timer.part("forward"):
        torch.cuda._sleep(100_000_000)  # device cycles: tens of milliseconds, while the host goes on at once
    timer.end_step()
    assert timer.window() == Window({}, [])
    window = timer.window()
    assert 0.01 < window.parts["forward"] <= window.total
