"""The one way in which tests start processes: ``run_ranks(world_size, function, *args)``."""

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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, function, args), daemon=True) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, folder, timeout_s)
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
        log = Path(folder, f"log{rank}").read_text()[-2000:]
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
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
