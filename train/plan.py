"""``python -m train plan``: what a recipe comes to on a number of ranks, and what changes against the number that it was written for.

Needs no GPU and no process group, and no data where the recipe says ``data.num_images``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.shard_set import open_set
from train.accelerators import ACCELERATORS
from train.budget import describe_budget, describe_fits, fit_all, gpu_named, plan_budget
from train.config import BatchConfig, ConfigError, DataConfig, RunConfig, ScheduleConfig, load_run_config, validate
from train.dist import import_deepspeed, read_ranks
from train.document import Document
from train.ds_config import load_ds_config
from train.redact import redact
from train.schedule import build_curve
from train.stages import Stage, plan_stages
from train.table import table

_ERROR = 2
_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


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
        )
        for stage in stages
    )
    curves = tuple(_plan_curve(key, curve, lr, [stages[index] for index in covered]) for key, curve, lr, covered in _curves(cfg))
    total = sum(stage.steps * stage.images_per_step for stage in stages)
    return Plan(world_size, num_images, planned, curves, sum(stage.steps for stage in stages), total)


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


def written_for(cfg: RunConfig) -> int | None:
    """The number of ranks that take the recipe's global batch without accumulation; None if it fixes none, or its stages disagree."""
    batches = [batch for _, batch in _batches(cfg)]
    if any(batch.global_batch_size is None or batch.global_batch_size % batch.micro_batch_size for batch in batches):
        return None
    ranks = {batch.global_batch_size // batch.micro_batch_size for batch in batches}
    return ranks.pop() if len(ranks) == 1 else None


def count_classes(data: DataConfig) -> int:
    """The identities: what the recipe says, or else what its records hold. Raises: DataError if these cannot be opened."""
    if data.num_classes is not None:
        return data.num_classes
    return int((open_set(data.path).images_per_class >= data.min_images_per_identity).sum())


def count_images(data: DataConfig) -> int:
    """The images of an epoch: what the recipe says, or else what its records hold. Raises: DataError if these cannot be opened."""
    if data.num_images is not None:
        return data.num_images
    per_class = open_set(data.path).images_per_class
    return int(per_class[per_class >= data.min_images_per_identity].sum())


def _batches(cfg: RunConfig) -> Iterator[tuple[str, BatchConfig]]:
    """The batches in use, with the key that each has in the recipe."""
    if any(stage.batch is None for stage in cfg.stages):
        yield "batch", cfg.batch
    for index, stage in enumerate(cfg.stages):
        if stage.batch:
            yield f"stages.{index}.batch", stage.batch


def _curves(cfg: RunConfig) -> Iterator[tuple[str, ScheduleConfig, float, list[int]]]:
    """The learning-rate curves in use: section in the recipe, config, learning rate, indices of the stages on it."""
    sharing = [index for index, stage in enumerate(cfg.stages) if stage.schedule is None]
    if sharing:
        yield "schedule", cfg.schedule, cfg.optimizer.lr, sharing
    for index, stage in enumerate(cfg.stages):
        if stage.schedule:
            yield f"stages.{index}.schedule", stage.schedule, stage.schedule.lr, [index]


def _lr_key(section: str) -> str:
    return "optimizer.lr" if section == "schedule" else f"{section}.lr"


def _plan_curve(section: str, config: ScheduleConfig, lr: float, stages: Sequence[Stage]) -> CurvePlan:
    batch = stages[0].images_per_step
    length = sum(stage.steps * stage.images_per_step for stage in stages)
    curve = build_curve(config, lr, batch=batch, steps_per_epoch=stages[0].steps_per_epoch, length=length)
    return CurvePlan(_lr_key(section), lr, curve.warmup // batch, sum(stage.steps for stage in stages), config.decay, config.final_lr)


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
    for section, config, _, covered in _curves(cfg):
        if config.warmup_steps:
            lengths = [cfg.stages[index].steps for index in covered]
            # rounding may take more from the steps than from the warm-up that is a part of them
            longest = math.inf if None in lengths else sum(max(1, round(steps * factor)) for steps in lengths)
            yield f"{section}.warmup_steps={min(round(config.warmup_steps * factor), longest)}"


def _lr_scaled(cfg: RunConfig, factor: float) -> Iterator[str]:
    for section, config, lr, _ in _curves(cfg):
        yield f"{_lr_key(section)}={lr * factor:.6g}"
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
    epochs = plan.total_images / plan.num_images
    lines.append(f"in all: {plan.total_steps:,} steps, {plan.total_images:,} images, {epochs:.4g} epochs of {plan.num_images:,} images")
    if any(stage.until is not None for stage in plan.stages):
        lines.append("a stage with until may end earlier and leaves the rest of its images to the next one, whose batch decides the steps")
    return "\n".join(lines)


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


def main(argv: Sequence[str]) -> int:
    """Print the plan. Exit codes: 0 done, 2 something given is wrong (on stderr, one line per problem)."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        cfg = load_run_config(arguments.config, arguments.overrides)
        import_deepspeed(read_ranks().device)
        if arguments.all:
            _all_configs(arguments, cfg)
        else:
            _one_config(arguments, cfg)
    except (ValueError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return _ERROR
    return 0


def _all_configs(arguments: argparse.Namespace, cfg: RunConfig) -> None:
    """``--all``: which of ds_configs/ fits which card."""
    fits = fit_all(cfg, sorted(_CONFIGS.glob("*.json")), count_classes(cfg.data), arguments.world_size)
    _write_json(arguments.json, {"model": cfg.model.name, "world_size": arguments.world_size, "fits": [asdict(fit) for fit in fits]})
    print(f"{arguments.config} on {arguments.world_size} ranks: {cfg.model.name}\n")
    sizes = dict.fromkeys(str(cfg.stage_batch(index).micro_batch_size) for index in range(len(cfg.stages)))
    print(describe_fits(fits, " and ".join(sizes)))


def _one_config(arguments: argparse.Namespace, cfg: RunConfig) -> None:
    """Without ``--all``: steps, learning rate, memory and speed."""
    if arguments.deepspeed_config is None:
        raise ValueError("--deepspeed_config: expected one of ds_configs/*.json, found nothing; or --all for a table over all of them")
    config, deepspeed = load_ds_config(arguments.deepspeed_config, cfg, arguments.world_size, "cuda")
    gpu = arguments.gpu and gpu_named(arguments.gpu)
    num_images = count_images(cfg.data)
    plan = plan_run(cfg, num_images, arguments.world_size)
    reference = arguments.reference or written_for(cfg)
    compared = reference not in (None, plan.world_size)
    comparison = compare(cfg, num_images, plan.world_size, reference) if compared else None
    network = arguments.network * 1e9 / 8
    steps = [stage.steps for stage in plan.stages]
    budget = plan_budget(cfg, config, deepspeed.precision, count_classes(cfg.data), arguments.world_size, steps, gpu, network)
    said = {"zero_stage": deepspeed.zero_stage, "precision": deepspeed.precision, "model": cfg.model.name}
    _write_json(arguments.json, {**said, **asdict(plan), "comparison": comparison and asdict(comparison), "budget": budget.as_json()})
    print(f"{arguments.config} on {plan.world_size} ranks: {cfg.model.name}, ZeRO {deepspeed.zero_stage}, {deepspeed.precision}\n")
    print(describe(plan))
    print(f"\n{describe_budget(budget, network)}")
    if comparison:
        print(f"\nAgainst the {reference} ranks that the recipe was written for:\n\n{describe_comparison(comparison)}")
    elif reference:
        print("\nThis is the number of ranks that the recipe was written for.")
    else:
        print("\nNo comparison: the recipe does not fix its global batch; --reference N says how many ranks it was written for.")


def _write_json(path: Path | None, content: dict) -> None:
    if path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "train plan",
        description="What a recipe comes to on a number of ranks: batches, steps, learning rate; memory of a rank; with --gpu an estimate of "
        "speed; and what changes against the number of ranks that it was written for. Needs no GPU, and no data where the recipe says "
        "data.num_images and data.num_classes.",
    )

    def ranks(text: str) -> int:
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
        return number

    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML), see train/recipes/")
    parser.add_argument(
        "--deepspeed_config", type=Path, help="DeepSpeed's JSON, see ds_configs/README.md; checked for a GPU. Needed unless --all is given"
    )
    parser.add_argument("--world-size", type=ranks, required=True, metavar="N", help="ranks, one per GPU")
    parser.add_argument(
        "--reference", type=ranks, metavar="N",
        help="ranks that the recipe was written for (default: those that take its batch.global_batch_size without accumulation)",
    )  # fmt: skip
    parser.add_argument(
        "--all", action="store_true", help="instead: which of ds_configs/*.json fits a GPU of 80, 40 and 24 GiB, up to which batch"
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"estimate speed on it, and warn if it is too small: {', '.join(ACCELERATORS)}")
    parser.add_argument(
        "--network", type=float, default=400.0, metavar="GBIT", help="Gbit/s between nodes for each GPU (default: %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. batch.micro_batch_size=192")
    return parser
