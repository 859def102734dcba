"""Whether what must be equal on all ranks still is: memory, a device or a transfer may fail without an error.

ZeRO gathers the weights anew in every step, so a rank that got or keeps wrong ones shows it between two steps only, while its forward and
backward passes go astray: look right before ``engine.step``, not after it. What a rank owns alone (its optimizer's float32 masters, its
class centers) has no copy to be compared with.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.collectives import Collectives
from model.partial_fc import PartialFC
from train.dist import RankError, Ranks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**18  # elements at a time: 2 MiB of int64 stay in a CPU's cache
_SHOWN = 3  # names in a message


def replicas(engine, head: PartialFC) -> dict[str, Tensor]:
    """The tensors that must be equal, bit for bit, on all ranks; not copies. BatchNorm's statistics differ by design.

    Of a DeepSpeedEngine the weights that forward uses: under ZeRO 1 and 2 all of them, under ZeRO 3 those that it keeps whole (small ones).
    Of the head what has no row a class.
    """
    weights = {name: p.data for name, p in engine.module.named_parameters() if getattr(p, "ds_persist", True)}
    return {**weights, **{f"head.{name}": tensor for name, tensor in head.replicated_state().items()}}


def require_equal(step: int, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Stop the run at ``step`` unless ``tensors``, of the same names on all ranks, are equal on all of them; the host waits for the device.

    Raises: RankError, on every rank. Collectives: a gather of [1, P] int64 for P tensors; where something differs, one of host names.
    """
    if odd := odd_ranks(tensors, ranks):
        raise RankError(f"step {step}: {_describe(odd, ranks.gather(socket.gethostname()))}")


def odd_ranks(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, set[int]]:
    """Of the tensors that are not equal on all ranks: which ranks differ from the majority; all of them, where no half is equal.

    Collectives: a gather of [1, P] int64.
    """
    if ranks.world_size == 1 or not tensors:
        return {}
    mine = torch.stack([checksum(tensor).to(ranks.device) for tensor in tensors.values()])
    every = Collectives(ranks.group).gather(mine.unsqueeze(0))()  # [world_size, P]
    if bool((every == every[0]).all()):
        return {}
    return {name: strangers for name, sums in zip(tensors, every.T.tolist(), strict=True) if (strangers := _strangers(sums))}


def checksum(tensor: Tensor) -> Tensor:
    """Sum of (2 i + 1) x_i modulo 2^64 as a scalar int64 on the tensor's device, where x_i is element i with its bits read as an integer.

    It is another one after any single bit has flipped, because the weights are odd; and after two different elements of up to 4 bytes have
    changed places, because (2 i - 2 j) (x_i - x_j) lies within 2^64 for fewer than 2^31 elements.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _PIECE):
        piece = bits[start : start + _PIECE]
        total += (piece * torch.arange(2 * start + 1, 2 * (start + len(piece)), 2, device=bits.device)).sum()
    return total


def _strangers(sums: Sequence[int]) -> set[int]:
    value, count = Counter(sums).most_common(1)[0]
    return {rank for rank, found in enumerate(sums) if found != value or 2 * count <= len(sums)}


def _describe(odd: Mapping[str, set[int]], hosts: Sequence[str]) -> str:
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    names = ", ".join(list(odd)[:_SHOWN]) + more
    strangers = sorted(set().union(*odd.values()))
    who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in strangers)
    if len(strangers) < len(hosts):
        what = f"{who}: other values than on the other ranks, of {names}"
    else:
        what = f"{who}: different values of {names}, and no majority to tell which are right"
    return (
        f"{what}. They are computed to be equal: memory, a device or a transfer has failed without an error. Start again from the newest "
        "checkpoint; if the same rank differs again, have its hardware checked"
    )
