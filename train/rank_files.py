"""The rank files of a checkpoint, as a run of any number of ranks reads them: mapped into memory, of each only what is asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.class_shard import ClassShard
from model.partial_fc import ROW_STATE


class RankFiles:
    """``rank_00000.pt`` and so on, of the ``world_size`` ranks that wrote a checkpoint.

    A file is opened at the first need of it and stays mapped. ``nearest``: the file to look into first; a rank that goes on at the old
    world size finds all that it wants in its own.
    """

    def __init__(self, folder: Path, world_size: int, nearest: int = 0) -> None:
        self.folder, self.world_size = folder, world_size
        self._order = sorted(range(world_size), key=lambda rank: rank != nearest)
        self.of = lru_cache(maxsize=None)(self._open)  # everything in a rank's file

    def _open(self, rank: int) -> dict[str, Any]:
        return torch.load(self.folder / file_name(rank), weights_only=True, map_location="cpu", mmap=True)

    def piece(self, kind: str, parameter: str, start: int, stop: int) -> Tensor:
        """[stop - start]: elements of a flattened parameter's ``master``, moment or ``mean``, whichever ranks had them."""
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

    def head(self, num_classes: int, start: int, stop: int) -> dict[str, Tensor]:
        """The head's state for the classes [start, stop), see ``PartialFC.state``."""
        parts = []  # of each rank that has some of them: (its state, slice of its rows)
        for rank in range(self.world_size):
            shard = ClassShard(num_classes, rank, self.world_size)
            low, high = max(start, shard.start), min(stop, shard.stop)
            if low < high or (low == high == shard.start and not parts):
                parts.append((self.of(rank)["head"], slice(low - shard.start, high - shard.start)))
        state = dict(parts[0][0] if parts else self.of(self._order[0])["head"])
        for name in ROW_STATE & state.keys():
            state[name] = torch.cat([part[name][rows] for part, rows in parts]) if parts else state[name][:0]
        return state


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.pt"
