"""The process group and this rank's place in it: the only reader of RANK, LOCAL_RANK and WORLD_SIZE."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from train.redact import redact

T = TypeVar("T")


class RankError(ValueError):
    """Something given is wrong, on one rank or on several; raised alike on every rank."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    local_rank: int  # picks the device and the metrics port, nothing else
    world_size: int
    local_world_size: int  # ranks on this node
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_id(self) -> int | None:
        """The GPU's index for DALI; None on a CPU."""
        return self.device.index if self.device.type == "cuda" else None

    def say(self, text: str) -> None:
        """Print on rank 0, without secrets."""
        if self.is_first:
            print(redact(text), flush=True)

    def broadcast(self, value: object) -> object:
        """Rank 0's picklable ``value`` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def agree(self, value: Tensor) -> float:
        """Rank 0's float64 scalar on every rank; the host waits for the device. Collectives: one broadcast."""
        value = value.to(self.device, torch.float64, copy=True)
        dist.broadcast(value, 0, group=self.group)
        return float(value)

    def gather(self, value: object) -> list:
        """Every rank's picklable ``value`` in rank order, on every rank. A process without a group is alone."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run an action without collectives on every rank; if it raises ValueError or OSError on any, raise RankError on all.

        So no rank waits in a collective for one that has stopped, and the error can be told once. Collectives: one gather.
        """
        result, problem = None, None
        try:
            result = action()
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = self.gather(problem)
        failed = [rank for rank, text in enumerate(problems) if text is not None]
        if failed:
            distinct = list(dict.fromkeys(problems[rank] for rank in failed))
            everywhere = len(failed) == self.world_size and len(distinct) == 1
            raise RankError(distinct[0] if everywhere else "\n".join(f"rank {rank}: {problems[rank]}" for rank in failed))
        return result


def read_ranks() -> Ranks:
    """What the launcher (``deepspeed`` or ``torchrun``) put into the environment; one process on its own without a launcher."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return Ranks(rank, local_rank, world_size, local_world_size, device)


@contextmanager
def process_group(ranks: Ranks, timeout: timedelta) -> Iterator[Ranks]:
    """Join the default process group (nccl on GPUs, gloo on CPUs) through DeepSpeed and leave it in order at the end.

    ``timeout`` is that of the rendezvous and of the collectives of every group, those that DeepSpeed makes by itself included.

    Collectives: the rendezvous, and a barrier at a regular end (without it about half of the CPU runs abort in teardown).
    """
    import_deepspeed(ranks.device)
    import deepspeed

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(value))  # for one process without a launcher
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", timeout=timeout, verbose=False)
    # DeepSpeed passes new groups no timeout: they would have torch's default of 30 minutes (10 under NCCL).
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout)
    yield Ranks(ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size, ranks.device, dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


def lost_connection(error: Exception) -> str | None:
    """What a collective says if another rank is gone; None if ``error`` is of another kind. NCCL's words are not tried out yet."""
    text = str(error)
    if isinstance(error, RuntimeError) and ("gloo/transport" in text or "remote process exited" in text):
        return re.sub(r"^\[[^]]*\] |\. This is typically .*", "", text.partition("\n")[0])  # gloo begins with [file:line]
    return None


def import_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed so that it neither compiles an op (its shared-memory collective needs a C++ compiler and minutes) nor chats."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)
