"""How tests start ranks: ``run_ranks(world_size, function, *args)``; as threads of one process where there are many."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

_PRELOAD = "tests.preload"


def run_ranks(world_size: int, function, *args, timeout_s: float = 120.0) -> list:
    """Run ``function(group, *args)`` on ``world_size`` gloo ranks; its results in rank order.

    ``function`` must be importable (module level). Raises AssertionError with the traceback of the rank that failed first, or names
    the ranks that had not finished after ``timeout_s``. Ranks are forked from a server that has imported torch and deepspeed once.
    """
    return _run([(_rank_main, (rank, world_size)) for rank in range(world_size)], world_size, function, args, timeout_s)


def run_thread_ranks(world_size: int, function, *args, timeout_s: float = 120.0) -> list:
    """:func:`run_ranks`, but the ranks are threads of one process over torch's own test group: 64 of them start in a second."""
    return _run([(_threads_main, (world_size,))], world_size, function, args, timeout_s)


def _run(mains: list, world_size: int, function, args, timeout_s: float) -> list:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [context.Process(target=main, args=(*which, folder, function, args), daemon=True) for main, which in mains]
        for process in processes:
            process.start()
        _wait(processes, folder, timeout_s)
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(ranks: list, folder: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.exitcode is None for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        unfinished = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    errors = sorted(Path(folder).glob("error*"), key=lambda path: path.stat().st_mtime)
    if errors:
        rank = errors[0].name.removeprefix("error")
        log = Path(folder, f"log{rank}")
        log = (log if log.exists() else Path(folder, "log0")).read_text()[-2000:]  # ranks that are threads share one
        raise AssertionError(f"rank {rank} failed:\n{errors[0].read_text()}\nits output ended with:\n{log}")
    dead = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode != 0 and rank not in unfinished}
    if dead:
        raise AssertionError(f"ranks ended without a traceback; exit codes: {dead}")
    if unfinished:
        raise AssertionError(f"ranks {unfinished} had not finished after {timeout_s:g} s")


def _rank_main(rank: int, world_size: int, folder: str, function, args) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    log = os.open(f"{folder}/log{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):  # DeepSpeed is talkative; the log is shown if a rank fails
        os.dup2(log, stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        result = function(dist.group.WORLD, *args)
        (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
        if dist.is_initialized():  # the function may have left it
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _threads_main(world_size: int, folder: str, function, args) -> None:
    import threading

    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import multi_threaded_pg

    torch.set_num_threads(1)
    log = os.open(f"{folder}/log0", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store = dist.HashStore()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            with torch.autograd.set_multithreading_enabled(False):  # backward on the thread of the rank
                result = function(dist.group.WORLD, *args)
            (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
        except BaseException as error:
            (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # lets the others go

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(len(list(Path(folder).glob("error*"))) > 0)
