"""What a checkpoint holds of the DeepSpeed engine: every parameter's float32 master and optimizer moments, in pieces that know their place.

ZeRO cuts the flattened parameters at places that depend on its stage and on the number of ranks. A piece is named by the parameter and the
elements of it, so a run goes on from the pieces of any number of ranks and any ZeRO stage, and nothing is unpickled. DeepSpeed's own
checkpoint does neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config import ConfigError

# Where DeepSpeed's optimizers keep this rank's float32 masters: ZeRO 1 and 2; ZeRO 1 with bfloat16 weights; ZeRO 3.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes in one
_COUNTS = ("global_steps", "global_samples", "skipped_steps")

Pieces = dict[str, Any]  # parameter -> {"start": first element, kind: values [n] float32, ...}
Read = Callable[[str, str, int, int], Tensor]  # (kind, parameter, start, stop) -> values [stop - start]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a flattened parameter, which lie at ``offset`` in this rank's ``index``-th master."""

    name: str
    start: int
    count: int
    index: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """[count]: this piece of a tensor that is laid out as the master; a view."""
        return flat.view(-1).narrow(0, self.offset, self.count)


def local_masters(engine) -> list[Tensor]:
    """This rank's flat float32 masters in DeepSpeed's order, padding included; changing them in place changes the weights.

    Raises: ConfigError if they are not in memory as float32.
    """
    optimizer = engine.optimizer
    masters = next((getattr(optimizer, name) for name in _MASTERS if hasattr(optimizer, name)), [])
    if not masters or any(master.dtype != torch.float32 or master.numel() == 0 for master in masters):  # NVMe leaves empty tensors behind
        found = [f"{master.dtype} [{master.numel()}]" for master in masters]
        raise ConfigError(
            f"a run needs ZeRO's float32 master weights in memory, found {found or 'none'} in {type(optimizer).__name__}; keep them in "
            "float32 on the device or the CPU (zero_optimization.offload_optimizer.device)"
        )
    return masters


def fragments(engine) -> Iterator[Fragment]:
    """Where this rank's part of every parameter lies; of some parameters a rank has nothing."""
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO 3 cuts every parameter into equal parts, the last one padded
            index, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                yield Fragment(name, start, count, index, offset)
        elif (mapping := parameter._hp_mapping) is not None:
            place, part = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Fragment(name, part.start, part.numel, mapping.param_group_index, place.start)


def engine_state(engine, means: Sequence[Tensor] | None = None) -> dict[str, Any]:
    """This rank's pieces, and what is equal on all ranks; tensors are not copied.

    Before the first step that was applied there are no moments.

    Args:
        means: of each master another tensor laid out alike, kept as the kind ``mean`` (see train.ema).
    """
    masters, torch_optimizer = local_masters(engine), engine.optimizer.optimizer
    moments = [{key: value for key, value in torch_optimizer.state[master].items() if _is_moment(value, master)} for master in masters]
    flats = [{"master": master, **moment} for master, moment in zip(masters, moments, strict=True)]
    for flat, mean in zip(flats, means or (), strict=means is not None):
        flat["mean"] = mean
    pieces: Pieces = {}
    for fragment in fragments(engine):
        of_kind = {kind: fragment.of(flat) for kind, flat in flats[fragment.index].items()}
        pieces[fragment.name] = {"start": fragment.start, **of_kind}
    others = {key: value for key, value in torch_optimizer.state[masters[0]].items() if not _is_moment(value, masters[0])}
    return {
        "pieces": pieces,
        "shapes": {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in engine.module.named_parameters()},
        "moments": list(moments[0]),
        "optimizer": others,  # the step count, as the optimizer has it
        "groups": [group.get("step") for group in torch_optimizer.param_groups],  # where apex and DeepSpeed's fused Adam count
        "loss_scaler": {name: getattr(engine.optimizer.loss_scaler, name) for name in _present(engine)},
        "counts": {name: getattr(engine, name) for name in _COUNTS},
    }


@torch.no_grad()
def load_engine_state(engine, state: dict[str, Any], read: Read, means: Sequence[Tensor] | None = None) -> None:
    """Take over masters, moments and ``means`` as ``read`` has them, and the rest of ``state``, which any rank of any number may have made.

    Collectives: a gather of the low-precision weights.
    """
    masters, torch_optimizer = local_masters(engine), engine.optimizer.optimizer
    flats = []  # of each master {kind: tensor}
    for master in masters:
        torch_optimizer.state.pop(master, None)
        moments = {kind: torch.zeros_like(master) for kind in state["moments"]}
        if moments:
            others = {key: _like(value, master) for key, value in state["optimizer"].items()}
            torch_optimizer.state[master] = {**others, **moments}
        flats.append({"master": master, **moments})
    for flat, mean in zip(flats, means or (), strict=means is not None):
        flat["mean"] = mean
    for fragment in fragments(engine):
        for kind, flat in flats[fragment.index].items():
            fragment.of(flat).copy_(read(kind, fragment.name, fragment.start, fragment.start + fragment.count))
    for group, step in zip(torch_optimizer.param_groups, state["groups"], strict=True):
        group.pop("step", None)  # of a run that goes back to before its first step of the backbone
        if step is not None:
            group["step"] = step
    for name, value in state["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, value)
    for name, value in state["counts"].items():
        setattr(engine, name, value)
    _refresh_weights(engine.optimizer)


@torch.no_grad()
def load_weights(engine, weights: Mapping[str, Tensor]) -> None:
    """Give a new engine these weights and buffers, float32 by name; its masters have them exactly, before any rounding to its precision.

    Raises: ConfigError, see :func:`local_masters`. Collectives: a gather of the low-precision weights.
    """
    masters = local_masters(engine)
    for fragment in fragments(engine):
        piece = weights[fragment.name].flatten()[fragment.start : fragment.start + fragment.count]
        fragment.of(masters[fragment.index]).copy_(piece)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(weights[name])
    _refresh_weights(engine.optimizer)


def _refresh_weights(optimizer) -> None:
    """Give the weights of forward the values of the masters, as DeepSpeed does after a step."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:  # small ones, which ZeRO 3 never takes apart
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _is_moment(value: Any, master: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == master.shape and value.dim() > 0


def _like(value: Any, master: Tensor) -> Any:
    return value.to(master.device, copy=True) if torch.is_tensor(value) else value


def _present(engine) -> list[str]:
    return [name for name in _LOSS_SCALER if hasattr(engine.optimizer.loss_scaler, name)]
