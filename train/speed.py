"""How long an optimizer step would take on a named GPU: an estimate from data sheets and the assumptions below, never a measurement.

products     floating-point operations / (the data sheet's rate x PRODUCT_EFFICIENCY)
memory       bytes that pass between kernels / (the data sheet's bandwidth x MEMORY_EFFICIENCY)
network      bytes a rank sends / the slower of the links that a ring crosses
step         products + memory + what of the network nothing hides
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.activations import activations
from model.flops import backbone_flops, backbone_forward_flops, head_flops
from model.head_memory import HeadShape
from model.vit import PRESETS
from train.accelerators import Accelerator
from train.config import RunConfig
from train.memory import Backbone, ZeroSettings

PRODUCT_EFFICIENCY = 0.6  # of the data sheet, which large products on one GPU come near; assumed
MEMORY_EFFICIENCY = 0.8  # assumed
LINK_EFFICIENCY = 0.8  # assumed
ACTIVATION_PASSES = 5  # an activation is written, read by the next layer and by backward; its gradient is written and read; assumed
EVALUATION_PASSES = 2  # of these written, and read by the next layer; assumed
OPTIMIZER_PASSES = 28  # bytes a parameter that AdamW reads and writes: weight, gradient and two moments in float32
GPUS_PER_NODE = 8  # assumed: fewer ranks talk over the links within a node


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, over rings."""

    gradients: int  # of the backbone, reduced; hidden behind backward where overlap_comm is on
    weights: int  # gathered
    head_samples: int  # embeddings and labels gathered, their gradients reduced
    head_sums: int  # cosines and sums of exponentials

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def step_traffic(backbone: Backbone, zero: ZeroSettings, head: HeadShape) -> Traffic:
    """Of all collectives of a step of ``head.grad_accum_steps`` micro-batches.

    ZeRO 1 and 2 reduce by all-reduce, though a rank needs its own share alone (DeepSpeed's default, use_multi_rank_bucket_allreduce), and
    ZeRO 2 does so in every micro-batch.
    """
    W, P, s, steps = head.world_size, backbone.parameters, zero.weight_bytes, head.grad_accum_steps
    B, D = head.global_micro_batch, head.embedding_size
    gradient_bytes = zero.accumulate_bytes if zero.stage == 1 else s
    anchors = 2 if head.centers in ("pco", "pco_shared", "epl") else 1
    scored_anchors = 2 if head.centers in ("pco", "epl") else 1

    def once(payload: int) -> int:  # a gather of the payload, or a reduction that leaves each rank its share
        return payload * (W - 1) // W

    if zero.stage == 3:
        small = sum(size for group in backbone.groups for size in group if size <= zero.persistence_threshold)
        gradients = once(s * P) * steps
        rounds = 1 if zero.max_live_parameters >= P else 2  # what stays gathered after forward is not gathered again for backward
        weights = rounds * once(s * (P - small)) * steps + once(s * small)
    else:
        gradients = 2 * once(gradient_bytes * P) * (steps if zero.stage == 2 else 1)
        weights = once(s * P)
    sums = 16 * B * anchors + 4 * B * scored_anchors * (1 + head.uniface)
    return Traffic(gradients, weights, (2 * once(4 * B * D) + once(8 * B)) * steps, 2 * once(sums) * steps)


@dataclass(frozen=True)
class Speed:
    """An estimate. Seconds of an optimizer step."""

    gpu: str
    flops: float  # of a rank and step, recomputation not counted
    products_s: float
    memory_s: float
    network_s: float  # all of it
    exposed_s: float  # that no computation hides
    images_per_second: float  # of all ranks
    utilisation: float  # of the data sheet's operations: flops / (step x rate)

    @property
    def step_s(self) -> float:
        return self.products_s + self.memory_s + self.exposed_s


def stage_speed(
    cfg: RunConfig,
    backbone: Backbone,
    zero: ZeroSettings,
    precision: str,
    head: HeadShape,
    gpu: Accelerator,
    network: float,
) -> Speed:
    """Of the stage that ``head`` describes.

    Args:
        precision: DeepSpeed's.
        network: bytes/s between nodes for each GPU; ranks of one node use the GPU's own links.
    Raises: ValueError if the GPU does not compute in that precision.
    """
    operands = _operands(precision, gpu)
    preset, model = PRESETS[cfg.model.name], cfg.model
    options = {"mask_ratio": model.mask_ratio, "embedding_size": model.embedding_size}
    images = head.micro_batch_size * head.grad_accum_steps
    counted = images * backbone_flops(preset, **options)
    recomputed = images * backbone_forward_flops(preset, **options) * model.activation_checkpointing
    of_head = _head_flops(head) * head.grad_accum_steps
    head_rate = gpu.flops["bf16" if head.product_bytes == 2 and "bf16" in gpu.flops else "fp32"]
    products = ((counted + recomputed) / gpu.flops[operands] + of_head / head_rate) / PRODUCT_EFFICIENCY

    kept = activations(preset, head.micro_batch_size, weight_bytes=zero.weight_bytes, **options).kept
    passes = ACTIVATION_PASSES + model.activation_checkpointing
    logits = head.global_micro_batch * head.scored * head.product_bytes
    terms = 2 if head.centers in ("pco", "epl") else 1
    passed = head.grad_accum_steps * (passes * kept + 3 * terms * logits)  # logits are written once and read for both gradients
    passed += OPTIMIZER_PASSES * (backbone.parameters // head.world_size + head.scored * head.embedding_size)
    memory = passed / (gpu.bandwidth * MEMORY_EFFICIENCY)

    traffic = step_traffic(backbone, zero, head)
    link = LINK_EFFICIENCY * (gpu.link_bandwidth if head.world_size <= GPUS_PER_NODE else min(gpu.link_bandwidth, network))
    hidden = min(traffic.gradients / link, (products + memory) / 2) if zero.overlaps else 0.0  # within half of a step, all of it backward
    total = traffic.total / link
    step = products + memory + total - hidden
    flops = counted + of_head
    rate = gpu.flops[operands]
    return Speed(gpu.name, flops, products, memory, total, total - hidden, images * head.world_size / step, flops / (step * rate))


def pass_seconds(cfg: RunConfig, zero: ZeroSettings, precision: str, images: int, gpu: Accelerator) -> float:
    """Of a rank's ``images`` through the backbone in evaluation, as for class means: all tokens, and nothing kept for backward.

    Without what a rank sends, under ZeRO 3 a lower bound. Raises: ValueError as ``stage_speed``.
    """
    preset, size = PRESETS[cfg.model.name], cfg.model.embedding_size
    products = images * backbone_forward_flops(preset, embedding_size=size) / gpu.flops[_operands(precision, gpu)]
    passed = EVALUATION_PASSES * images * activations(preset, 1, weight_bytes=zero.weight_bytes, embedding_size=size).kept
    return products / PRODUCT_EFFICIENCY + passed / (gpu.bandwidth * MEMORY_EFFICIENCY)


def _operands(precision: str, gpu: Accelerator) -> str:
    """Dtype of the backbone's products, from DeepSpeed's precision. Raises: ValueError if the GPU does not compute in it."""
    operands = {"bf16": "bf16", "bf16_autocast": "bf16", "fp16": "fp16"}.get(precision, "fp32")
    if operands not in gpu.flops:
        raise ValueError(f"{gpu.name} has no {operands} tensor cores; use one of ds_configs/*_fp16.json")
    return operands


def _head_flops(head: HeadShape) -> int:
    """Of one rank and micro-batch."""
    terms = 2 if head.centers in ("pco", "epl") else 1
    trained = 0 if head.centers == "replace" else 1
    return head_flops(head.global_micro_batch, head.scored, head.embedding_size, terms=terms, trained_terms=trained)
