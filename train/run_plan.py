"""A run in optimizer steps: what a recipe comes to on a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.config import RunConfig, ScheduleConfig
from train.schedule import build_curve
from train.stages import Stage, plan_stages
from train.table import table


@dataclass(frozen=True)
class StagePlan:
    """One stage on a number of ranks."""

    name: str
    epochs: int | None  # None: the recipe gives steps
    until: float | None  # the mean squared target cosine that ends it before its time
    steps: int  # optimizer steps, if no stage ends before its time
    micro_batch_size: int  # images per rank and forward pass
    grad_accum_steps: int
    global_batch_size: int  # images per optimizer step
    sample_rate: float
    centers: str
    update_expectation: bool
    margin: str
    freeze_backbone: bool  # the class centers alone learn


@dataclass(frozen=True)
class CurvePlan:
    """A learning-rate curve: the run's, or that of one stage."""

    key: str  # optimizer.lr, or stages.1.schedule.lr
    lr: float  # at the end of the warm-up
    warmup_steps: int  # optimizer steps, of the batch of the first stage on the curve
    steps: int  # optimizer steps of the whole curve
    decay: str  # to final_lr
    final_lr: float


@dataclass(frozen=True)
class Plan:
    """A run on a number of ranks."""

    world_size: int
    num_images: int  # of an epoch
    stages: tuple[StagePlan, ...]
    curves: tuple[CurvePlan, ...]
    total_steps: int  # optimizer steps
    total_images: int  # trained on in all these steps
    class_means: bool  # one pass over all images comes before the first step


def plan_run(cfg: RunConfig, num_images: int, world_size: int) -> Plan:
    """The run in optimizer steps, of which an epoch has ``num_images // global_batch_size``.

    Raises: ConfigError if a global batch cannot be shared by the ranks, the images do not fill one, or a warm-up is too long.
    """
    stages, _ = plan_stages(cfg, num_images, world_size)
    planned = tuple(
        StagePlan(
            name=stage.name,
            epochs=stage.config.epochs,
            until=stage.config.until and stage.config.until.target_cosine_square,
            steps=stage.steps,
            micro_batch_size=stage.micro_batch_size,
            grad_accum_steps=stage.grad_accum_steps,
            global_batch_size=stage.images_per_step,
            sample_rate=stage.config.sample_rate,
            centers=stage.config.centers,
            update_expectation=stage.config.update_expectation,
            margin=stage.margin.text(),
            freeze_backbone=stage.config.freeze_backbone,
        )
        for stage in stages
    )
    curves = tuple(_plan_curve(key, curve, lr, [stages[index] for index in covered]) for key, curve, lr, covered in curves_in_use(cfg))
    total = sum(stage.steps * stage.images_per_step for stage in stages)
    means = cfg.head.init_centers == "class_means"
    return Plan(world_size, num_images, planned, curves, sum(stage.steps for stage in stages), total, means)


def curves_in_use(cfg: RunConfig) -> Iterator[tuple[str, ScheduleConfig, float, list[int]]]:
    """The learning-rate curves in use: section in the recipe, config, learning rate, indices of the stages on it."""
    sharing = [index for index, stage in enumerate(cfg.stages) if stage.schedule is None]
    if sharing:
        yield "schedule", cfg.schedule, cfg.optimizer.lr, sharing
    for index, stage in enumerate(cfg.stages):
        if stage.schedule:
            yield f"stages.{index}.schedule", stage.schedule, stage.schedule.lr, [index]


def lr_key(section: str) -> str:
    return "optimizer.lr" if section == "schedule" else f"{section}.lr"


def _plan_curve(section: str, config: ScheduleConfig, lr: float, stages: Sequence[Stage]) -> CurvePlan:
    batch = stages[0].images_per_step
    length = sum(stage.steps * stage.images_per_step for stage in stages)
    curve = build_curve(config, lr, batch=batch, steps_per_epoch=stages[0].steps_per_epoch, length=length)
    return CurvePlan(lr_key(section), lr, curve.warmup // batch, sum(stage.steps for stage in stages), config.decay, config.final_lr)


def describe(plan: Plan) -> str:
    """The plan as a table of its stages, and lines on learning rate and length."""
    rows = [("stage", "length", "until", "batch per rank", "accumulation", "global batch", "steps", "sample_rate", "centers", "margin")]
    for stage in plan.stages:
        rows.append(
            (
                stage.name,
                f"{stage.epochs} epochs" if stage.epochs else f"{stage.steps} steps",
                "" if stage.until is None else f"cos^2 {stage.until:g}",
                f"{stage.micro_batch_size}",
                f"{stage.grad_accum_steps}",
                f"{stage.global_batch_size:,}",
                f"{stage.steps:,}",
                f"{stage.sample_rate:g}",
                stage.centers + (", e updated" if stage.update_expectation else ""),
                stage.margin,
            )
        )
    lines = [*table(rows), ""]
    for curve in plan.curves:
        decay = f"{curve.decay} decay to {curve.final_lr:g}"
        lines.append(
            f"{curve.key}: {curve.lr:g} after {curve.warmup_steps:,} steps of warm-up, {decay} at the end of {curve.steps:,} steps"
        )
    first = plan.stages[0]
    if any(stage.grad_accum_steps > 1 for stage in plan.stages):
        at_once = first.micro_batch_size * plan.world_size
        lines.append(
            f"accumulation: the head's loss is over the micro-batch of all ranks ({at_once:,} images in stage {first.name}), BatchNorm's "
            f"statistics over that of one ({first.micro_batch_size})"
        )
    if frozen := [stage.name for stage in plan.stages if stage.freeze_backbone]:
        lines.append(
            f"backbone: frozen in stage {', '.join(frozen)}, where the class centers alone learn; memory, traffic and speed are planned as "
            "if it were trained: an upper bound"
        )
    if plan.class_means:
        lines.append(
            f"before the first step: class means, one pass of the backbone forward over {plan.num_images:,} images, saved as step 0"
        )
    epochs = plan.total_images / plan.num_images
    lines.append(f"in all: {plan.total_steps:,} steps, {plan.total_images:,} images, {epochs:.4g} epochs of {plan.num_images:,} images")
    if any(stage.until is not None for stage in plan.stages):
        lines.append("a stage with until may end earlier and leaves the rest of its images to the next one, whose batch decides the steps")
    return "\n".join(lines)
