"""Which rank owns which class centers, and which of them a step scores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_INIT_BLOCK = 4096  # rows drawn from one generator; fixes the initial weight whatever the world size


@dataclass(frozen=True)
class ClassShard:
    """The contiguous classes ``[start, stop)`` of ``num_classes`` that one rank owns.

    The first ``num_classes % world_size`` ranks own one class more; with fewer classes than ranks the last ranks own none.
    """

    num_classes: int
    rank: int
    world_size: int

    @property
    def start(self) -> int:
        return self.rank * (self.num_classes // self.world_size) + min(self.rank, self.num_classes % self.world_size)

    @property
    def stop(self) -> int:
        return self.start + len(self)

    def __len__(self) -> int:
        return self.num_classes // self.world_size + (self.rank < self.num_classes % self.world_size)

    def localize(self, labels: Tensor) -> Tensor:
        """Row of each global label in this shard, -1 where another rank owns it. [B] int64 -> [B] int64."""
        local = labels - self.start
        return torch.where((local >= 0) & (local < len(self)), local, -1)


def initial_centers(shard: ClassShard, embedding_size: int, seed: int, std: float = 0.01) -> Tensor:
    """Normal(0, std) centers ``[len(shard), D]`` float32 that depend on (seed, class) alone, not on the world size.

    Drawn in blocks of 4096 classes, so that no rank ever builds the whole ``[C, D]`` matrix.
    """
    weight = torch.empty(len(shard), embedding_size)
    for block in range(shard.start // _INIT_BLOCK, -(-shard.stop // _INIT_BLOCK)):
        first = block * _INIT_BLOCK
        rows = torch.randn(_INIT_BLOCK, embedding_size, generator=torch.Generator().manual_seed(_mix(seed, block)))
        begin, end = max(first, shard.start), min(first + _INIT_BLOCK, shard.stop)
        weight[begin - shard.start : end - shard.start] = rows[begin - first : end - first]
    return weight.mul_(std)


def sample_centers(shard: ClassShard, positives: Tensor, sample_rate: float, seed: int, step: int) -> Tensor:
    """The centers that this rank scores at ``step``: every positive plus a uniform draw of its other classes.

    Partial FC, arXiv:2203.15565, Sec. 3; ``|S_rank| = max(int(sample_rate * len(shard)), number of positives)``. Each class gets a
    pseudo-random key from (seed, step, class) and the rank keeps the classes with the greatest keys, so the draw needs no generator
    state: it is the same after a resume, and a class's key is the same at any world size.

    Args:
        positives: [P] int64 local rows that must be kept, in any order, duplicates allowed.
        step: how many draws went before this one.
    Returns: [S] int64 sorted local rows, on the device of ``positives``.
    """
    kept = positives.unique()
    count = max(int(sample_rate * len(shard)), kept.numel())
    classes = torch.arange(shard.start, shard.stop, device=positives.device)
    keys = (_class_hash(classes, _mix(seed, step)) << 31) | classes  # the class breaks ties
    keys[kept] = torch.iinfo(torch.int64).max
    return keys.topk(count, sorted=False).indices.sort().values


def _mix(*numbers: int) -> int:
    """63 well-mixed bits of a tuple of integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _class_hash(classes: Tensor, salt: int) -> Tensor:
    """A 32-bit hash of each class under a 63-bit salt, as int64 in [0, 2**32): multiply-xorshift rounds over both halves of the salt."""
    mask = 0xFFFFFFFF
    x = classes.clone()
    for half in (salt & mask, salt >> 32):
        x = (x ^ half) & mask
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x ^= x >> shift
            x = (x * factor) & mask  # int64 products wrap; their low 32 bits are right
        x ^= x >> 16
    return x
