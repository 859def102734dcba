"""The collectives of the head over a process group; where one process owns every class, each result is its operand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor

Started = Callable[[], Tensor]  # a transfer under way: call it to wait, on CUDA on the stream alone, and to get its result


class Collectives:
    """Gather, sum, maximum and scatter over ``group``; None is a single process.

    Each starts its transfer and returns at once, so that the caller can compute meanwhile. NCCL runs it on a stream of its own, gloo in a
    thread of its own. Operands must not be touched before the result is asked for.
    """

    def __init__(self, group: dist.ProcessGroup | None, waiting: Callable[[], AbstractContextManager] = nullcontext) -> None:
        """``waiting``: entered around every wait for a transfer, to time it."""
        self._group, self._waiting = group, waiting
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1

    def gather(self, x: Tensor) -> Started:
        """[b, ...] -> [b * world_size, ...] in rank order; b is the same on every rank."""
        if self.world_size == 1:
            return lambda: x
        out = x.new_empty(x.shape[0] * self.world_size, *x.shape[1:])
        return self._result(dist.all_gather_single(out, x.contiguous(), group=self._group, async_op=True), out)

    def sum(self, x: Tensor) -> Started:
        """Sum over ranks, in place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def maximum(self, x: Tensor) -> Started:
        """Maximum over ranks, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def scatter_sum(self, x: Tensor) -> Started:
        """[b * world_size, D] -> this rank's [b, D] of the sum over ranks."""
        if self.world_size == 1:
            return lambda: x
        out = x.new_empty(x.shape[0] // self.world_size, *x.shape[1:])
        return self._result(dist.reduce_scatter_single(out, x, group=self._group, async_op=True), out)

    def _reduce(self, x: Tensor, op: dist.ReduceOp) -> Started:
        if self.world_size == 1:
            return lambda: x
        return self._result(dist.all_reduce(x, op, group=self._group, async_op=True), x)

    def _result(self, work: dist.Work, out: Tensor) -> Started:
        def wait() -> Tensor:
            with self._waiting():
                work.wait()
            return out

        return wait
