"""GPU memory of one rank in every phase of an optimizer step, worked out before a GPU is touched.

Each phase is a sum of named parts, and the highest phase is the peak. The parts are of tensors alone, as torch counts them: beside them a
process holds what :data:`RESERVE` allows for. The backbone's part: :mod:`model.activations`; the head's: :mod:`model.head_memory`; what
DeepSpeed (0.19.8) holds is worked out here, and tests/unit/test_memory.py compares it with what DeepSpeed really allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from model.activations import Activations, activations
from model.head_memory import HeadMemory, HeadShape, head_memory
from model.partial_fc import CHUNK_ROWS
from model.sharded_softmax import needs_shift
from model.vit import IMAGE_SIZE, PRESETS, build_vit
from train.config import RunConfig
from train.engine import parameter_groups

_MASTER, _MOMENTS, _FLOAT64 = 4, 8, 8  # bytes a parameter
_LOADED_BATCHES = 3  # of uint8 images that DALI holds on the GPU: two made in advance and one in work. Assumed: its decoder keeps more
# What a process holds on a GPU beside tensors. Assumed, not measured: CUDA's context and kernels, cuBLAS workspaces and NCCL's channels;
# and the share that the caching allocator loses in blocks that do not fit what is asked for.
RESERVE_BYTES, RESERVE_SHARE = int(1.5 * 2**30), 0.05


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's JSON says about memory, its defaults filled in."""

    stage: int
    weight_bytes: int  # of a weight in forward and backward
    accumulate_bytes: int  # of a gradient that is kept
    bucket_elements: int
    buckets: int  # two where ZeRO 1 and 2 reduce while backward goes on
    overlaps: bool  # whether they, or ZeRO 3, do
    max_live_parameters: int  # ZeRO 3: gathered weights are released beyond it
    prefetch_elements: int  # ZeRO 3
    persistence_threshold: int  # ZeRO 3: smaller parameters are never partitioned
    optimizer_on_cpu: bool
    parameters_on_cpu: bool  # ZeRO 3

    @classmethod
    def of(cls, config: dict, precision: str) -> ZeroSettings:
        """``config``: as :func:`train.ds_config.load_ds_config` returns it. Imports deepspeed."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**config["zero_optimization"])
        weight_bytes = 2 if precision in ("bf16", "fp16") else 4
        in_float32 = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"

        def on_cpu(section) -> bool:
            return section is not None and section.device != "none"

        return cls(
            int(zero.stage),
            weight_bytes,
            4 if in_float32 else weight_bytes,
            int(zero.reduce_bucket_size),
            2 if zero.overlap_comm and zero.stage < 3 else 1,
            bool(zero.overlap_comm),
            int(zero.max_live_parameters),
            int(zero.prefetch_bucket_size),
            int(zero.param_persistence_threshold),
            on_cpu(zero.offload_optimizer),
            on_cpu(zero.offload_param),
        )


@dataclass(frozen=True)
class Backbone:
    """Sizes of a backbone's parameters, in elements."""

    parameters: int
    largest: int
    block: int  # of one transformer block
    groups: tuple[tuple[int, ...], ...]  # of each parameter, in the optimizer's groups and order

    @classmethod
    def of(cls, cfg: RunConfig) -> Backbone:
        """Of the recipe's backbone; no memory is allocated."""
        with torch.device("meta"):
            net = build_vit(cfg.model.name, embedding_size=cfg.model.embedding_size)
        groups = tuple(tuple(parameter.numel() for parameter in group["params"]) for group in parameter_groups(net, cfg.optimizer))
        sizes = [size for group in groups for size in group]
        return cls(sum(sizes), max(sizes), _numel(net.blocks[0]), groups)

    def touched(self, world_size: int) -> list[int]:
        """Elements of all parameters of which a rank owns a part, for every rank.

        ZeRO 1 and 2 copy a gradient whole, however small the part. The ranks that share the large weight of the embedding layer pay for it.
        """
        return [sum(owned) for owned in zip(*(self._touched(group, world_size) for group in self.groups), strict=True)]

    @staticmethod
    def _touched(group: tuple[int, ...], world_size: int) -> list[int]:
        """Of one group, of which every rank owns an equal part."""
        share = -(-sum(group) // (2 * world_size)) * 2
        owned, start = [0] * world_size, 0
        for size in group:
            for rank in range(start // share, min((start + size - 1) // share + 1, world_size)):
                owned[rank] += size
            start += size
        return owned


@dataclass(frozen=True)
class Phase:
    """Bytes by part in one phase of a step."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """One rank in one stage of the run, in the last micro-batch of an optimizer step: the rank that holds most."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def needed(self) -> int:
        """Bytes of a GPU that the process asks for: the peak and the reserve."""
        return RESERVE_BYTES + round(self.peak.total * (1 + RESERVE_SHARE))


def stage_memory(
    cfg: RunConfig,
    backbone: Backbone,
    zero: ZeroSettings,
    num_classes: int,
    world_size: int,
    stage: int,
    *,
    micro_batch_size: int | None = None,
) -> RankMemory:
    """Of stage ``stage`` of the recipe. ``micro_batch_size``: another than the recipe's, with its accumulation."""
    shape = head_shape(cfg, zero, num_classes, world_size, stage, micro_batch_size)
    model = cfg.model
    acts = activations(
        PRESETS[model.name],
        shape.micro_batch_size,
        weight_bytes=zero.weight_bytes,
        mask_ratio=model.mask_ratio,
        embedding_size=model.embedding_size,
        activation_checkpointing=model.activation_checkpointing,
    )
    states = _States(backbone, zero, world_size, shape.grad_accum_steps, model.ema_decay is not None)
    return RankMemory(tuple(_phases(states, acts, head_memory(shape), shape, PRESETS[model.name].depth)))


def head_shape(
    cfg: RunConfig, zero: ZeroSettings, num_classes: int, world_size: int, stage: int, micro_batch_size: int | None = None
) -> HeadShape:
    """What the head's memory depends on in stage ``stage``, as train.build sets the head up on a GPU."""
    batch, config, head = cfg.stage_batch(stage), cfg.stages[stage], cfg.head
    margin = cfg.stage_margin(stage)
    curricular = bool(getattr(margin, "curricular", False))
    low = head.product_dtype == "bfloat16" or (head.product_dtype == "auto" and zero.weight_bytes == 2)
    return HeadShape(
        cfg.model.embedding_size,
        num_classes,
        world_size,
        micro_batch_size or batch.micro_batch_size,
        grad_accum_steps=batch.accumulation(world_size),
        sample_rate=config.sample_rate,
        centers=config.centers,
        update_expectation=config.update_expectation,
        optimizer=head.optimizer,
        product_bytes=2 if low else 4,
        chunk_rows=head.chunk_rows or CHUNK_ROWS["cuda"],
        curricular=curricular,
        uniface=head.loss == "uniface",
        logits_in_float32=head.interclass_filter is not None or needs_shift(head.scale, curricular, num_classes),
    )


class _States:
    """What DeepSpeed holds of the backbone, in bytes."""

    def __init__(self, backbone: Backbone, zero: ZeroSettings, world_size: int, grad_accum_steps: int, ema: bool) -> None:
        P, s = backbone.parameters, zero.weight_bytes
        share = -(-P // world_size)
        partitioned = zero.stage == 3
        self.zero, self.s = zero, s
        self.largest, self.block = backbone.largest, backbone.block
        small = sum(size for group in backbone.groups for size in group if size <= zero.persistence_threshold)
        self.always = {
            "weights": s * (small + (0 if zero.parameters_on_cpu else share)) if partitioned else s * P,
            "master weights": 0 if zero.optimizer_on_cpu else _MASTER * share,
            "AdamW moments": 0 if zero.optimizer_on_cpu else _MOMENTS * share,
            "mean of the weights": _MASTER * share if ema and not zero.optimizer_on_cpu else 0,
        }
        # ZeRO 3 holds its bucket and its share of the gradients from the start.
        bucket_bytes = zero.accumulate_bytes if zero.stage == 1 else s
        self.buckets = bucket_bytes * zero.bucket_elements * zero.buckets
        accumulating = grad_accum_steps > 1
        touched = max(backbone.touched(world_size))
        if partitioned:
            self.own_gradients = 0 if zero.optimizer_on_cpu else zero.accumulate_bytes * share
            self.earlier_gradients = self.own_gradients
        else:
            in_place = zero.accumulate_bytes > s  # then in a float32 partition
            self.own_gradients = 4 * share if in_place else s * touched
            self.earlier_gradients = (zero.accumulate_bytes * P if zero.stage == 1 else self.own_gradients) if accumulating else 0
        self.always_buckets = partitioned or (zero.stage == 1 and accumulating)
        self.gathered = s * min(P, zero.max_live_parameters + zero.prefetch_elements) if partitioned else 0
        self.oversized = s * backbone.largest if backbone.largest > zero.bucket_elements else 0
        self.norm = _FLOAT64 * min(backbone.largest, share)  # gradients are summed up as float64
        self.flat_gradients = 0 if zero.optimizer_on_cpu else (_MASTER + zero.accumulate_bytes) * share
        self.reducing = s * min(P, zero.bucket_elements)  # a bucket is copied to be reduced
        self.parameters, self.bucket_elements = P, zero.bucket_elements


def _phases(states: _States, acts: Activations, head: HeadMemory, shape: HeadShape, depth: int) -> Iterator[Phase]:
    always = {
        **states.always,
        "class centers": head.weight,
        "their moments": head.moments + head.step_counts,
        "expectations": head.expectation + head.remembered,
        "images": acts.images,
        "decoded images": _LOADED_BATCHES * shape.micro_batch_size * 3 * IMAGE_SIZE**2,
    }
    earlier = {"buckets": states.buckets * states.always_buckets, "gradients": states.earlier_gradients}
    gathering = states.gathered + 2 * states.s * states.largest if states.gathered else 0
    yield Phase("forward", {**always, **earlier, "gathered weights": gathering, "activations": acts.kept, "head's gradients": head.earlier})
    yield Phase(
        "head",
        {
            **always,
            **earlier,
            "gathered weights": states.gathered,
            "activations": acts.kept,
            "head's gradients": head.earlier + head.gradients,
            "head's logits": head.buffer + head.passing,
            "head's operands": head.gathered + head.operands,
        },
    )
    yield from _backward(always, states, acts, head, depth)
    gradients = states.own_gradients + max(states.norm, states.flat_gradients)
    yield Phase("optimizer", {**always, "gradients": gradients, "head's gradients": head.pending})
    yield Phase("head's step", {**always, "head's gradients": head.pending + head.stepping})


def _backward(always: dict[str, int], states: _States, acts: Activations, head: HeadMemory, depth: int) -> Iterator[Phase]:
    """The embedding layer, whose weight is the largest; the worst of the blocks; the last bucket, which is reduced when all is done."""
    common = {**always, "buckets": states.buckets, "gathered weights": states.gathered}
    pending = head.pending + head.adding
    held = states.earlier_gradients
    # A gradient larger than a bucket is reduced by itself, at once: the copies of that come while it is still there.
    largest = states.s * states.largest + (max(states.own_gradients, states.reducing) if states.oversized else 0)
    yield Phase("embedding", {**common, "gradients": held + largest, "activations": acts.kept, "head's gradients": pending})
    own = max(states.own_gradients, states.oversized if states.zero.stage == 1 else 0)  # ZeRO 1 keeps it to the end, owned or not
    of_blocks = []
    for left in range(1, depth + 1):
        # Once a bucket was full, what is owned of it has been copied.
        reduced = states.parameters - states.block * left > states.bucket_elements
        gradients = held + (own + states.reducing) * reduced
        parts = {**common, "gradients": gradients, "activations": acts.in_backward(left, depth), "head's gradients": head.pending}
        of_blocks.append(Phase("blocks", parts))
    yield max(of_blocks, key=lambda phase: phase.total)
    last = own + states.reducing if states.parameters > states.bucket_elements else max(own, states.reducing)
    yield Phase("reduction", {**common, "gradients": held + last, "head's gradients": head.pending})


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
