"""A recipe on another number of ranks than it was written for: the global batch kept by accumulating, or the learning rate scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from train.config import BatchConfig, ConfigError, RunConfig, validate
from train.document import Document
from train.run_plan import Plan, curves_in_use, lr_key, plan_run
from train.table import table


@dataclass(frozen=True)
class Variant:
    """One way to run a recipe on another number of ranks."""

    kept: str
    learning_rate: str  # what became of it
    overrides: tuple[str, ...]  # what to add to the command line
    plan: Plan
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The run as it was written, and the ways to run it on another number of ranks."""

    reference: Plan
    global_batch: Variant | None  # kept by accumulating
    square_root: Variant  # the accumulation kept; learning rate for Adam by Malladi et al. 2022, arXiv:2205.10287
    linear: Variant  # the accumulation kept; learning rate for SGD by Goyal et al. 2017, arXiv:1706.02677
    refusal: str  # why the global batch cannot be kept; empty if it can


def compare(cfg: RunConfig, num_images: int, world_size: int, reference: int) -> Comparison:
    """What a recipe written for ``reference`` ranks comes to on ``world_size``: the global batch kept, or the accumulation.

    Raises: ConfigError as :func:`plan_run`, for the reference and for an accumulation that is kept.
    """
    ratio = world_size / reference

    def variant(kept: str, learning_rate: str, overrides: Sequence[str], note: str = "") -> Variant:
        return Variant(kept, learning_rate, tuple(overrides), plan_run(_changed(cfg, overrides), num_images, world_size), note)

    accumulation = [
        f"{key}.global_batch_size={batch.micro_batch_size * batch.accumulation(reference) * world_size}"
        for key, batch in _batches(cfg)
        if batch.global_batch_size is not None
    ]
    accumulation += _steps_scaled(cfg, 1 / ratio)
    try:
        global_batch, refusal = variant("global batch", "unchanged", [*_global_batch_kept(cfg, world_size, reference)]), ""
    except ConfigError as error:
        global_batch, refusal = None, str(error)
    return Comparison(
        plan_run(cfg, num_images, reference),
        global_batch,
        variant("accumulation", "square-root rule", [*accumulation, *_lr_scaled(cfg, math.sqrt(ratio))], _adam_note(cfg, ratio)),
        variant("accumulation", "linear rule", [*accumulation, *_lr_scaled(cfg, ratio)]),
        refusal,
    )


def recipe_warnings(plan: Plan, reference: Plan | None) -> Iterator[str]:
    """What of batch and learning rate is likely to be a mistake. ``reference``: the run as it was written, if that is known."""
    for curve in plan.curves:
        if not curve.warmup_steps:
            yield f"{curve.key}: no warm-up, and AdamW's first steps are its largest: set schedule.warmup_epochs"
    for stage, written in zip(plan.stages, reference.stages if reference else (), strict=False):
        if stage.global_batch_size != written.global_batch_size:
            yield (
                f"stage {stage.name}: a global batch of {stage.global_batch_size:,} where the recipe was written for "
                f"{written.global_batch_size:,}, with the learning rate that it was written for: choose A, B or C below"
            )


def written_for(cfg: RunConfig) -> int | None:
    """The number of ranks that take the recipe's global batch without accumulation; None if it fixes none, or its stages disagree."""
    batches = [batch for _, batch in _batches(cfg)]
    if any(batch.global_batch_size is None or batch.global_batch_size % batch.micro_batch_size for batch in batches):
        return None
    ranks = {batch.global_batch_size // batch.micro_batch_size for batch in batches}
    return ranks.pop() if len(ranks) == 1 else None


def _batches(cfg: RunConfig) -> Iterator[tuple[str, BatchConfig]]:
    """The batches in use, with the key that each has in the recipe."""
    if any(stage.batch is None for stage in cfg.stages):
        yield "batch", cfg.batch
    for index, stage in enumerate(cfg.stages):
        if stage.batch:
            yield f"stages.{index}.batch", stage.batch


def _global_batch_kept(cfg: RunConfig, world_size: int, reference: int) -> Iterator[str]:
    for key, batch in _batches(cfg):
        if batch.global_batch_size is None:
            fixed = BatchConfig(micro_batch_size=batch.micro_batch_size, global_batch_size=batch.images_per_step(reference))
            yield f"{key}.grad_accum_steps={fixed.accumulation(world_size)}"


def _steps_scaled(cfg: RunConfig, factor: float) -> Iterator[str]:
    """Overrides that keep the images of what the recipe gives in steps."""
    for index, stage in enumerate(cfg.stages):
        if stage.steps is not None:
            yield f"stages.{index}.steps={max(1, round(stage.steps * factor))}"
    for section, config, _, covered in curves_in_use(cfg):
        if config.warmup_steps:
            lengths = [cfg.stages[index].steps for index in covered]
            # rounding may take more from the steps than from the warm-up that is a part of them
            longest = math.inf if None in lengths else sum(max(1, round(steps * factor)) for steps in lengths)
            yield f"{section}.warmup_steps={min(round(config.warmup_steps * factor), longest)}"


def _lr_scaled(cfg: RunConfig, factor: float) -> Iterator[str]:
    for section, config, lr, _ in curves_in_use(cfg):
        yield f"{lr_key(section)}={lr * factor:.6g}"
        if config.final_lr:
            yield f"{section}.final_lr={config.final_lr * factor:.6g}"


def _adam_note(cfg: RunConfig, ratio: float) -> str:
    """The whole rule of arXiv:2205.10287, for a batch that is ``ratio`` times as large: 1 - beta times ratio, eps over its root."""
    first, second = (1 - ratio * (1 - beta) for beta in cfg.optimizer.betas)
    if min(first, second) < 0:
        return ""
    eps = cfg.optimizer.eps / math.sqrt(ratio)
    return f"in full, the rule also asks for 'optimizer.betas=[{first:.6g}, {second:.6g}]' optimizer.eps={eps:.3g}"


def _changed(cfg: RunConfig, overrides: Sequence[str]) -> RunConfig:
    document = Document("recipe", cfg.model_dump(mode="json"))
    for override in overrides:
        document.override(override)
    return validate(document)


def describe_comparison(comparison: Comparison) -> str:
    """The reference and the variants side by side, what to add to the command line for each, and what no number shows."""
    reference = comparison.reference
    named = {"A": comparison.global_batch, "B": comparison.square_root, "C": comparison.linear}
    variants = {letter: variant for letter, variant in named.items() if variant}
    plans = [reference, *(variant.plan for variant in variants.values())]

    def row(name: str, cell: Callable[[Plan], str]) -> tuple[str, ...]:
        return name, *map(cell, plans)

    rows = [
        ("", "as written", *variants),
        row("ranks", lambda plan: f"{plan.world_size}"),
        ("kept", "", *(variant.kept for variant in variants.values())),
        ("learning rate", "", *(variant.learning_rate for variant in variants.values())),
    ]
    for index, stage in enumerate(reference.stages):
        rows.append(row(f"{stage.name}: batch", lambda plan, i=index: _batch_text(plan, i)))
        rows.append(row(f"{stage.name}: steps", lambda plan, i=index: f"{plan.stages[i].steps:,}"))
    for index, curve in enumerate(reference.curves):
        rows.append(row(curve.key, lambda plan, i=index: f"{plan.curves[i].lr:g}"))
        rows.append(row("warm-up steps", lambda plan, i=index: f"{plan.curves[i].warmup_steps:,}"))
    rows.append(row("steps in all", lambda plan: f"{plan.total_steps:,}"))
    lines = [*table(rows), "", "batch: images per rank x accumulation x ranks = global batch"]
    if comparison.refusal:
        lines.append(f"A  the global batch cannot be kept: {comparison.refusal}")
    for letter, variant in variants.items():
        lines.append(f"{letter}  {' '.join(variant.overrides) or 'nothing to add: the recipe as it is'}")
        if variant.note:
            lines.append(f"   {variant.note}")
    return "\n".join([*lines, "", *_caveats(reference, comparison.linear.plan)])


def _batch_text(plan: Plan, index: int) -> str:
    stage = plan.stages[index]
    return f"{stage.micro_batch_size} x {stage.grad_accum_steps} x {plan.world_size} = {stage.global_batch_size:,}"


def _caveats(reference: Plan, plan: Plan) -> Iterator[str]:
    name, size = reference.stages[0].name, reference.stages[0].micro_batch_size
    there, here = size * reference.world_size, size * plan.world_size
    yield "A changes neither learning rate nor steps, up to the few images that do not fill a batch. B: the square-root rule for Adam,"
    yield "Malladi et al. 2022 (arXiv:2205.10287). C: the linear rule for SGD, Goyal et al. 2017 (arXiv:1706.02677), beside it to compare."
    yield f"The head's loss is over the images that all ranks take at once, in stage {name} {there:,} as written and {here:,} on"
    yield f"{plan.world_size} ranks, accumulated or not. BatchNorm sees the {size} images of a rank either way."
    if any(stage.until is not None for stage in reference.stages):
        yield "until.smoothing and until.check_every count steps: in B and C they cover other numbers of images than as written."
