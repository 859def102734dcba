"""Copies of a rank's state in host memory, from which it is written to disk while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_Place = tuple[str | int, ...]


class HostCopy:
    """Copies trees of dicts, lists and tuples; their tensors into host memory that the next copy uses again.

    Fresh memory costs several times the copy itself in page faults, and on a GPU pinning it costs more still.
    """

    def __init__(self) -> None:
        self._tensors: dict[_Place, Tensor] = {}  # of the last copy

    def of(self, tree: Any) -> Any:
        """A copy, valid until the next call; values other than tensors are taken over. Waits until it is complete."""
        tensors: dict[_Place, Tensor] = {}
        devices = set()

        def copied(value: Any, place: _Place) -> Any:
            if isinstance(value, Tensor):
                devices.add(value.device)
                tensors[place] = self._copy(value.detach(), place)
                return tensors[place]
            if isinstance(value, dict):
                return {key: copied(item, (*place, key)) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(item, (*place, index)) for index, item in enumerate(value))
            return value

        copy = copied(tree, ())
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._tensors = tensors
        return copy

    def _copy(self, value: Tensor, place: _Place) -> Tensor:
        host = self._tensors.get(place)
        if host is None or host.shape != value.shape or host.dtype != value.dtype:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        return host.copy_(value, non_blocking=True)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree of dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(tensor_bytes, items))
