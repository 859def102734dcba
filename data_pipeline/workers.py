"""Spreads jobs over processes, counts what they have done, and passes on what goes wrong in them."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from data_pipeline.errors import DataError

_FEW = 4096  # images that one process packs in a fifth of a second
Count = Callable[[int], object]  # told how many more images are done
Work = Callable[[Any, Count], Any]  # (job, count) -> result


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def choose_workers(asked: int | None, num_images: int) -> int:
    """``asked``; None: one per core, or this process alone where starting others takes longer than the work."""
    if asked is not None and asked < 1:
        raise DataError(f"--workers {asked}: must be at least 1")
    return asked or (1 if num_images <= _FEW else default_workers())


def run_jobs(work: Work, jobs: Iterable[Any], workers: int, count: Count) -> Iterator[Any]:
    """Yield ``work(job, count)`` of every job as they are done, in any order. Everything is pickled, ``work`` once per process.

    With one worker everything happens in this process. An exception of a job is raised here. When this generator ends, however it does,
    the other processes have ended too; so they do when this process is killed. Raises DataError when one of them dies.
    """
    if workers == 1:
        for job in jobs:
            yield work(job, count)
        return
    jobs = iter(jobs)
    crew: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            _start(work, crew)
        busy = set(crew)
        while busy:
            for pipe in wait(list(crew)):  # of those without a job too, whose end is the only thing to hear
                kind, value = _receive(pipe, crew[pipe])
                if kind == "count":
                    count(value)
                elif kind == "error":
                    raise value
                else:
                    if kind == "result":
                        yield value
                    try:
                        job = next(jobs)
                    except StopIteration:
                        busy.remove(pipe)
                    else:
                        _send(job, pipe, crew[pipe])
    finally:
        for process in crew.values():
            process.kill()  # a worker has nothing to clean up: what it has not finished is not there
        for process in crew.values():
            process.join()


def run_to_end(work: Work, jobs: Sequence[Any], workers: int, count: Count) -> None:
    """``run_jobs`` where only what the jobs leave on the disk counts."""
    with closing(run_jobs(work, jobs, min(workers, len(jobs)), count)) as results:
        for _ in results:
            pass


def _start(work: Work, crew: dict[Connection, SpawnProcess]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that only run here
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    resource_tracker.ensure_running()  # which unblocks the signals when it starts
    # Ctrl-C reaches the whole process group, and so may SIGTERM: it is for this process to end the others. They inherit the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process.start()
        crew[ours] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()


def _receive(pipe: Connection, process: SpawnProcess) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise _death(process) from None


def _send(job: Any, pipe: Connection, process: SpawnProcess) -> None:
    try:
        pipe.send(job)
    except OSError:
        raise _death(process) from None


def _death(process: SpawnProcess) -> DataError:
    process.join()
    return DataError(
        f"a worker process died (exit code {process.exitcode}; -9 is what the system does when memory runs out): use fewer workers"
    )


def _serve(work: Work, pipe: Connection) -> None:
    """Do the jobs that come down the pipe, until it is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(kind: str, value: Any) -> None:
        try:
            pipe.send((kind, value))
        except OSError:
            os._exit(1)  # the parent is gone

    tell("ready", None)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        try:
            result = work(job, lambda n: tell("count", n))
        except Exception as error:
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            tell("error", error)
        else:
            tell("result", result)


def _end_with_parent() -> None:
    """End at once when the parent is killed: what it began may soon be taken up by another one."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
