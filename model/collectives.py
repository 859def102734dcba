"""The collectives of the head over a process group, and plain copies where one process owns every class."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class Collectives:
    """Gather, sum and scatter over ``group``; None is a single process."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1

    def gather(self, x: Tensor) -> Tensor:
        """[b, ...] -> [b * world_size, ...] in rank order; b is the same on every rank."""
        if self.world_size == 1:
            return x
        out = x.new_empty(x.shape[0] * self.world_size, *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=self._group)
        return out

    def sum(self, x: Tensor) -> None:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self._group)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[b * world_size, D] -> this rank's [b, D] of the sum over ranks."""
        if self.world_size == 1:
            return x
        out = x.new_empty(x.shape[0] // self.world_size, *x.shape[1:])
        dist.reduce_scatter_single(out, x, group=self._group)
        return out
