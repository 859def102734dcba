"""What ``train plan`` says about memory and speed: numbers of every stage, warnings, and the table of all DeepSpeed configs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.accelerators import ACCELERATORS, Accelerator
from train.config import ConfigError, RunConfig
from train.ds_config import load_ds_config
from train.memory import RESERVE_BYTES, RESERVE_SHARE, Backbone, RankMemory, ZeroSettings, head_shape, stage_memory
from train.run_plan import Plan
from train.speed import LINK_EFFICIENCY, MEMORY_EFFICIENCY, PRODUCT_EFFICIENCY, Speed, Traffic, pass_seconds, stage_speed, step_traffic
from train.table import table

CARDS_GIB = (80, 40, 24)
# Images a second that one core decodes and augments: 6 to 7 thousand were measured on a 2-core machine; the lower is taken.
IMAGES_PER_CORE = 6000
_GIB, _DAY = 2**30, 86400.0


@dataclass(frozen=True)
class StageBudget:
    """One stage on a number of ranks."""

    name: str
    memory: RankMemory
    traffic: Traffic
    speed: Speed | None  # None where no GPU was named
    days: float | None


@dataclass(frozen=True)
class Budget:
    """The whole run."""

    stages: tuple[StageBudget, ...]
    warnings: tuple[str, ...]
    class_means_days: float | None  # before the first step; None where there are none, or no GPU was named

    @property
    def days(self) -> float:
        return sum(stage.days for stage in self.stages) + (self.class_means_days or 0.0)

    def as_json(self) -> dict[str, Any]:
        """With the totals that the dataclasses work out."""
        stages = []
        for stage in self.stages:
            phases = [{"phase": phase.name, "bytes": phase.total, "parts": phase.parts} for phase in stage.memory.phases]
            memory = {"peak_bytes": stage.memory.peak.total, "needed_bytes": stage.memory.needed, "phases": phases}
            speed = stage.speed and {**asdict(stage.speed), "step_s": stage.speed.step_s}
            traffic = {**asdict(stage.traffic), "total": stage.traffic.total}
            stages.append({"name": stage.name, "memory": memory, "bytes_sent": traffic, "speed": speed, "days": stage.days})
        return {"stages": stages, "class_means_days": self.class_means_days, "warnings": list(self.warnings)}


def plan_budget(
    cfg: RunConfig,
    config: dict,
    precision: str,
    num_classes: int,
    world_size: int,
    plan: Plan,
    gpu: Accelerator | None,
    network: float,
) -> Budget:
    """Memory, traffic and, on ``gpu``, speed of every stage.

    Args:
        config, precision: what ``load_ds_config`` returned.
        plan: of the same recipe and ranks.
        network: bytes/s between nodes for each GPU.
    """
    zero, backbone = ZeroSettings.of(config, precision), Backbone.of(cfg)
    stages = []
    for index, stage in enumerate(cfg.stages):
        head = head_shape(cfg, zero, num_classes, world_size, index)
        speed = gpu and stage_speed(cfg, backbone, zero, precision, head, gpu, network)
        days = speed and plan.stages[index].steps * speed.step_s / _DAY
        memory = stage_memory(cfg, backbone, zero, num_classes, world_size, index)
        stages.append(StageBudget(stage.name, memory, step_traffic(backbone, zero, head), speed, days))
    means = None
    if gpu and plan.class_means:
        means = pass_seconds(cfg, zero, precision, math.ceil(plan.num_images / world_size), gpu) / _DAY
    return Budget(tuple(stages), tuple(_warnings(cfg, zero, precision, world_size, stages, gpu)), means)


def _warnings(
    cfg: RunConfig, zero: ZeroSettings, precision: str, world_size: int, stages: Sequence[StageBudget], gpu: Accelerator | None
) -> Iterator[str]:
    for index, stage in enumerate(stages):
        if gpu and stage.memory.needed > gpu.memory_bytes:
            yield (
                f"stage {stage.name} does not fit: it needs {stage.memory.needed / _GIB:.1f} GiB, reserve included, and {gpu.name} has "
                f"{gpu.memory_bytes / _GIB:.0f}; try model.activation_checkpointing=true, or a smaller micro_batch_size"
            )
        decoded = cfg.data.num_threads * IMAGES_PER_CORE
        on_rank = stage.speed and stage.speed.images_per_second / world_size
        if on_rank and cfg.data.decode.device == "cpu" and on_rank > decoded:
            yield (
                f"stage {stage.name} may wait for data: {on_rank:,.0f} images/s a rank, and {cfg.data.num_threads} cores decode about "
                f"{decoded:,}; set data.num_threads={math.ceil(on_rank / IMAGES_PER_CORE)}"
            )
        if cfg.stage_batch(index).micro_batch_size < 16:
            yield f"stage {stage.name}: BatchNorm's statistics over {cfg.stage_batch(index).micro_batch_size} images a rank are noisy"
    if precision == "bf16_autocast":
        yield "torch_autocast is counted as float32: an upper bound, for it keeps some activations as bfloat16"
    if cfg.model.compile:
        yield "model.compile is counted as the eager model: fused kernels keep less"
    if zero.optimizer_on_cpu or zero.parameters_on_cpu:
        yield "offloading: the copies to and from the CPU are not in the time, and its memory is not in the table"


def describe_budget(budget: Budget, network: float) -> str:
    """Tables of memory and speed, and what they rest on."""
    lines = []
    for stage in budget.stages:
        lines += [f"Memory of a rank in stage {stage.name}, GiB:", "", *table(_memory_rows(stage.memory)), ""]
    reserve = f"{RESERVE_BYTES / _GIB:g} GiB and {RESERVE_SHARE:.0%}"
    lines.append("embedding, blocks and reduction are parts of backward.")
    lines.append(f"peak: tensors as torch counts them. needed: with {reserve} beside them (assumed).")
    lines += ["Attention is counted as on a GPU: no [n, n] matrix is kept.", ""]
    rows = [("stage", "sent by a rank and step, GiB:", "gradients", "weights", "head")]
    for stage in budget.stages:
        sent = stage.traffic
        head = sent.head_samples + sent.head_sums
        rows.append((stage.name, f"{sent.total / _GIB:.3f}", *(f"{part / _GIB:.3f}" for part in (sent.gradients, sent.weights, head))))
    lines += table(rows)
    if budget.stages[0].speed:
        rows = [("stage", "TFLOP a step", "products ms", "memory ms", "network ms", "not hidden", "step ms", "images/s", "MFU", "days")]
        for stage in budget.stages:
            speed = stage.speed
            seconds = (speed.products_s, speed.memory_s, speed.network_s, speed.exposed_s, speed.step_s)
            milliseconds = (f"{1e3 * value:.1f}" for value in seconds)
            rows.append(
                (
                    stage.name,
                    f"{speed.flops / 1e12:.1f}",
                    *milliseconds,
                    f"{speed.images_per_second:,.0f}",
                    f"{speed.utilisation:.0%}",
                    f"{stage.days:.2f}",
                )
            )
        lines += ["", f"Estimated, not measured, on {budget.stages[0].speed.gpu}:", "", *table(rows), ""]
        means = budget.class_means_days
        lines.append(
            f"in all: {budget.days:.2f} days" + ("" if means is None else f", of which {means * _DAY / 60:.1f} minutes for class means")
        )
        lines.append(
            f"It rests on data sheets and assumptions: products at {PRODUCT_EFFICIENCY:.0%} of the rate, memory at "
            f"{MEMORY_EFFICIENCY:.0%} of the bandwidth,\nlinks at {LINK_EFFICIENCY:.0%}, {network / 1e9:g} GB/s between nodes for each GPU "
            "(--network). Stalls of any other kind are not in it."
        )
    lines += [f"warning: {text}" for text in budget.warnings]
    return "\n".join(lines)


def _memory_rows(memory: RankMemory) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(name for phase in memory.phases for name in phase.parts))
    rows = [("", *(phase.name for phase in memory.phases))]
    for name in names:
        sizes = [phase.parts.get(name, 0) for phase in memory.phases]
        if any(sizes):
            rows.append((name, *(f"{size / _GIB:.3f}" if size else "" for size in sizes)))
    rows.append(("in all", *(f"{phase.total / _GIB:.3f}" for phase in memory.phases)))
    peak = memory.peak
    rows.append(
        (f"peak {peak.total / _GIB:.2f}, needed {memory.needed / _GIB:.2f}", *("^" * 5 * (phase is peak) for phase in memory.phases))
    )
    return rows


@dataclass(frozen=True)
class Fit:
    """One DeepSpeed config, all stages together."""

    config: str
    needed: int  # bytes of the stage that needs most, at the recipe's micro-batch
    largest: dict[int, int | None]  # GiB of a card: largest micro-batch that fits in every stage; None: not even 2
    refusal: str = ""  # why the recipe cannot run with this config


def fit_all(cfg: RunConfig, configs: Sequence[Path], num_classes: int, world_size: int) -> list[Fit]:
    """Every DeepSpeed config against :data:`CARDS_GIB`."""
    fits, backbone = [], Backbone.of(cfg)
    for path in configs:
        try:
            config, summary = load_ds_config(path, cfg, world_size, "cuda")
        except ConfigError as error:
            fits.append(Fit(path.name, 0, {}, str(error).splitlines()[0]))
            continue
        zero = ZeroSettings.of(config, summary.precision)
        needed = max(stage_memory(cfg, backbone, zero, num_classes, world_size, index).needed for index in range(len(cfg.stages)))
        largest = {card: largest_micro_batch(cfg, backbone, zero, num_classes, world_size, card * _GIB) for card in CARDS_GIB}
        fits.append(Fit(path.name, needed, largest))
    return fits


def largest_micro_batch(
    cfg: RunConfig, backbone: Backbone, zero: ZeroSettings, num_classes: int, world_size: int, memory_bytes: int
) -> int | None:
    """The largest that fits in every stage, with the recipe's accumulation; None if 2 images don't."""

    def fits(size: int) -> bool:
        return all(
            stage_memory(cfg, backbone, zero, num_classes, world_size, index, micro_batch_size=size).needed <= memory_bytes
            for index in range(len(cfg.stages))
        )

    if not fits(2):
        return None
    low, high = 2, 4
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe_fits(fits: Sequence[Fit], micro_batch_size: str) -> str:
    """The table of ``--all``."""
    rows = [("DeepSpeed config", f"needed at {micro_batch_size}", *(f"{card} GiB" for card in CARDS_GIB))]
    for fit in fits:
        if fit.refusal:
            continue
        cells = []
        for card in CARDS_GIB:
            verdict = "fits" if fit.needed <= card * _GIB else "does not fit"
            cells.append(f"{verdict}, at most {fit.largest[card]}" if fit.largest[card] else "not even 2 images")
        rows.append((fit.config, f"{fit.needed / _GIB:.1f} GiB", *cells))
    lines = table(rows)
    lines += [f"{fit.config}: {fit.refusal}" for fit in fits if fit.refusal]
    lines += ["", "at most: the largest micro_batch_size that fits in every stage, with the recipe's accumulation."]
    return "\n".join(lines)


def gpu_named(name: str) -> Accelerator:
    """Raises: ValueError that names those known."""
    if name.lower() not in ACCELERATORS:
        raise ValueError(f"--gpu: expected one of {', '.join(ACCELERATORS)}, got {name!r}")
    return ACCELERATORS[name.lower()]
