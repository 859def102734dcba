"""The rank files of a checkpoint, as a run of any number of ranks reads them: mapped into memory, of each only what is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.class_shard import ClassShard
from model.partial_fc import ROW_STATE

RankState = dict[str, Any]


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


class RankFiles:
    """``rank_00000.pt`` and so on, of the ``world_size`` ranks that wrote a checkpoint.

    A file holds ``engine`` (train.engine_state), ``head`` (``PartialFC.state``) and ``num_classes``, ``loader``, ``buffers`` (BatchNorm's),
    ``ema`` and ``random`` of its rank. It is opened at the first need of it and stays mapped.
    """

    def __init__(self, folder: Path, world_size: int, nearest: int = 0) -> None:
        """``nearest``: the file to look into first; a rank that goes on at the old world size finds all that it wants in its own."""
        self.folder, self.world_size = folder, world_size
        self._order = sorted(range(world_size), key=lambda rank: rank != nearest)
        self._opened: dict[int, RankState] = {}

    def of(self, rank: int) -> RankState:
        """Everything in a rank's file."""
        if rank not in self._opened:
            self._opened[rank] = torch.load(self.folder / file_name(rank), weights_only=True, map_location="cpu", mmap=True)
        return self._opened[rank]

    def piece(self, kind: str, parameter: str, start: int, stop: int) -> Tensor:
        """[stop - start] float32: elements of a flattened parameter's ``master``, moment or ``mean``, whichever ranks had them."""
        values, missing = torch.empty(stop - start), stop - start
        for rank in self._order:
            piece = self.of(rank)["engine"]["pieces"].get(parameter)
            if piece is None:
                continue
            first, found = piece["start"], piece[kind]
            low, high = max(start, first), min(stop, first + len(found))
            if low < high:
                values[low - start : high - start] = found[low - first : high - first]
                missing -= high - low
            if not missing:
                return values
        raise ValueError(f"{self.folder}: {missing} of the elements {start} to {stop} of {parameter} ({kind}) are in no rank's file")

    def backbone(self, kind: str = "master") -> dict[str, Tensor]:
        """The whole backbone in float32 under its released key names: the weights, or with ``mean`` the mean of the weights.

        BatchNorm statistics are pooled, see :func:`pooled_buffers`.
        """
        engine = self.of(0)["engine"]
        weights = {name: self.piece(kind, name, 0, math.prod(shape)).view(shape) for name, shape in engine["shapes"].items()}
        return {**weights, **self._buffers(kind)}

    def state_for(self, rank: int, world_size: int) -> RankState:
        """What ``rank`` of ``world_size`` ranks goes on from; the engine's pieces are those of another rank, see :meth:`piece`.

        At the old world size everything is as the rank left it. At another one, a rank has the rows of its own classes, BatchNorm
        statistics pooled over the old ranks, and no random state.
        """
        if world_size == self.world_size:
            return self.of(rank)
        first = self.of(0)
        everyone = [self.of(old) for old in range(self.world_size)]
        bad_records = {number: text for state in everyone[rank::world_size] for number, text in state["loader"]["bad_records"].items()}
        shard = ClassShard(first["num_classes"], rank, world_size)
        ema = first["ema"] and {**first["ema"], "buffers": self._buffers("mean")}
        return {
            **first,
            "head": self._head(shard),
            "loader": {**first["loader"], "bad_records": bad_records},
            "buffers": self._buffers("master"),
            "ema": ema,
            "random": None,
        }

    def _buffers(self, kind: str) -> dict[str, Tensor]:
        states = [self.of(rank) for rank in range(self.world_size)]
        own = [state["buffers"] if kind == "master" else {**state["buffers"], **state["ema"]["buffers"]} for state in states]
        return pooled_buffers(own)

    def _head(self, wanted: ClassShard) -> dict[str, Tensor]:
        """The head's state for the classes of a shard of any number of ranks."""
        parts = []  # of each rank that has some of them: (its state, slice of its rows)
        for rank in range(self.world_size):
            shard = ClassShard(wanted.num_classes, rank, self.world_size)
            low, high = max(wanted.start, shard.start), min(wanted.stop, shard.stop)
            if low < high:
                parts.append((self.of(rank)["head"], slice(low - shard.start, high - shard.start)))
        parts = parts or [(self.of(0)["head"], slice(0, 0))]
        state = dict(parts[0][0])
        return state | {name: torch.cat([part[name][rows] for part, rows in parts]) for name in ROW_STATE & state.keys()}


def pooled_buffers(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """BatchNorm's statistics over all ranks, each of which saw as many images: the mean of the means, and the mean of the variances plus
    the variance of the means. Counts are equal on all ranks.
    """
    pooled = {}
    for name, own in ranks[0].items():
        if not own.is_floating_point():
            pooled[name] = own.clone()
            continue
        if name.endswith("running_var"):
            means = [rank[name.replace("running_var", "running_mean")].double() for rank in ranks]
            second_moment = sum(rank[name].double() + mean.square() for rank, mean in zip(ranks, means, strict=True)) / len(ranks)
            value = second_moment - (sum(means) / len(ranks)).square()
        else:
            value = sum(rank[name].double() for rank in ranks) / len(ranks)
        pooled[name] = value.to(own.dtype)
    return pooled
