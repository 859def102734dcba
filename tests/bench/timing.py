"""How benchmarks time: contenders take turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def medians(contenders: dict[str, Callable[[], object]], repeats: int, device: str, *, warm_up: int = 1) -> dict[str, float]:
    """Median milliseconds of ``repeats`` calls of each contender, after ``warm_up`` calls that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(warm_up + repeats):
        for name, run in contenders.items():
            taken = milliseconds(run, device)
            if repeat >= warm_up:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Of one call: CPU time of this process, or the time between two events on the GPU."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return 1e3 * (time.process_time() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
