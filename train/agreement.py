"""What the fields of a recipe must agree on; each by itself is good already (train.config)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from train.document import Key, Problem, did_you_mean, dotted, show

if TYPE_CHECKING:
    from train.config import BatchConfig, RunConfig, ScheduleConfig, StageConfig
    from train.margins import MarginSection


def contradictions(run: RunConfig) -> Iterator[Problem]:
    """Every contradiction: where it stands, and what is wrong there."""
    checks = (_preset_problems, _batch_problems, _margin_problems, _schedule_problems, _stage_problems)
    for check in (*checks, _eval_problems, _checkpoint_problems, _watchdog_problems):
        yield from check(run)


def _preset_problems(run: RunConfig) -> Iterator[Problem]:
    from model.vit import PRESETS  # here, so that reading the schema does not import torch

    if run.model.name not in PRESETS:
        known = ", ".join(PRESETS)
        yield ("model", "name"), f"must be one of {known}, got {show(run.model.name)}{did_you_mean(run.model.name, PRESETS)}"


def _schedule_problems(run: RunConfig) -> Iterator[Problem]:
    if sharing := [stage for stage in run.stages if stage.schedule is None]:
        yield from _curve_problems(("schedule",), run.schedule, "optimizer.lr", run.optimizer.lr, sharing, "whole run")
    for index, stage in enumerate(run.stages):
        if stage.schedule:
            key = ("stages", index, "schedule")
            yield from _curve_problems(key, stage.schedule, f"{dotted(key)}.lr", stage.schedule.lr, [stage], "stage")
    if run.epochs is not None:
        lengths = [stage.epochs for stage in run.stages]
        parts = " + ".join(f"{stage.name} {stage.epochs}" for stage in run.stages)
        if None in lengths:
            yield ("epochs",), "cannot be checked, because a stage is given in steps; remove it"
        elif sum(lengths) != run.epochs:
            yield ("epochs",), f"is {run.epochs}, but the stages' epochs add up to {sum(lengths)} ({parts})"


def _curve_problems(
    key: Key, curve: ScheduleConfig, lr_name: str, lr: float, stages: Sequence[StageConfig], what: str
) -> Iterator[Problem]:
    """``stages``: those that the learning-rate ``curve`` covers."""
    if curve.final_lr > lr:
        yield (*key, "final_lr"), f"must not exceed {lr_name} = {lr:g}, got {curve.final_lr:g}"
    if curve.warmup_epochs and curve.warmup_steps is not None:
        both = f"{curve.warmup_steps} while warmup_epochs is {curve.warmup_epochs:g}"
        yield (*key, "warmup_steps"), f"is {both}; give one of the two"
    # Epochs and steps mixed, or a warm-up in the other unit, have no length before the data is opened.
    for unit, warmup in (("epochs", curve.warmup_epochs), ("steps", curve.warmup_steps or 0)):
        lengths = [getattr(stage, unit) for stage in stages]
        if None not in lengths and warmup > sum(lengths):
            yield (*key, f"warmup_{unit}"), f"is {warmup:g}, longer than the {what} of {sum(lengths)} {unit}"


def _eval_problems(run: RunConfig) -> Iterator[Problem]:
    if run.eval is None:
        return
    for given, missing in (("images", "pairs"), ("pairs", "images")):
        if getattr(run.eval, given) and not getattr(run.eval, missing):
            yield ("eval", missing), f"required beside eval.{given}, but not given"
    if not (run.eval.images or run.eval.pairs or run.eval.packs):
        yield ("eval",), "names no pairs: give images and pairs, or packs"


def _checkpoint_problems(run: RunConfig) -> Iterator[Problem]:
    if run.checkpoint.keep_best and not (run.eval and run.eval.every_checkpoint):
        yield (
            ("checkpoint", "keep_best"),
            "compares pair accuracies: set eval.images and eval.pairs, or eval.packs, and eval.every_checkpoint",
        )


def _stage_problems(run: RunConfig) -> Iterator[Problem]:
    names: set[str] = set()
    expectation_exists = False
    for index, stage in enumerate(run.stages):
        key: Key = ("stages", index)
        if stage.name in names:
            yield (*key, "name"), f"{stage.name!r} is taken by an earlier stage"
        names.add(stage.name)
        if (stage.epochs is None) == (stage.steps is None):
            given = "both" if stage.epochs else "neither"
            yield key, f"stage {stage.name!r} needs exactly one of epochs and steps, got {given}"
        if stage.until and stage is run.stages[-1]:
            yield (*key, "until"), "the last stage has no next one to hand its rest to; remove until, or add a stage"
        elif stage.until and (stage.schedule is None) != (run.stages[index + 1].schedule is None):
            yield (
                (*key, "until"),
                ("hands images on to a stage on another learning-rate curve; give both stages a schedule of their own, or neither"),
            )
        expectation_exists |= stage.update_expectation
        if stage.centers not in ("learned", "vpl") and not expectation_exists:
            yield (*key, "centers"), f"{stage.centers} needs expectations: set update_expectation: true in this stage or an earlier one"
        if stage.freeze_backbone and stage.centers == "replace" and not stage.update_expectation:
            yield (*key, "freeze_backbone"), "true leaves nothing to train: with centers: replace the class centers have no gradient either"
        if run.head.loss == "uniface" and stage.centers in ("pco", "pco_shared", "epl"):
            yield (*key, "centers"), f"{stage.centers} joins two softmax terms; with head.loss: uniface use learned, replace or vpl"


def _batch_problems(run: RunConfig) -> Iterator[Problem]:
    places: list[tuple[Key, BatchConfig]] = [(("batch",), run.batch)]
    places += [(("stages", index, "batch"), stage.batch) for index, stage in enumerate(run.stages) if stage.batch]
    for key, batch in places:
        if run.batch.global_batch_size and not (batch.grad_accum_steps or batch.global_batch_size):
            yield (
                (*key, "micro_batch_size"),
                (
                    f"the run's batch fixes a global batch of {run.batch.global_batch_size}, and this section, which is taken whole, says "
                    "neither global_batch_size nor grad_accum_steps; give one"
                ),
            )
        if batch.grad_accum_steps and batch.global_batch_size:
            yield (*key, "grad_accum_steps"), f"is {batch.grad_accum_steps} while global_batch_size is {batch.global_batch_size}; give one"


def _margin_problems(run: RunConfig) -> Iterator[Problem]:
    places: list[tuple[Key, MarginSection]] = [(("head", "margin"), run.head.margin)]
    places += [(("stages", index, "margin"), stage.margin) for index, stage in enumerate(run.stages) if stage.margin]
    for key, margin in places:
        if margin.kind == "magface":
            for low, high in (("l_a", "u_a"), ("l_m", "u_m")):
                if not getattr(margin, low) < getattr(margin, high):
                    yield (*key, high), f"must be above {low} = {getattr(margin, low):g}, got {getattr(margin, high):g}"
        elif run.head.loss == "uniface" and margin.kind == "unified" and margin.curricular:
            yield (*key, "curricular"), "changes the negatives of a softmax; with head.loss: uniface set it to false"


def _watchdog_problems(run: RunConfig) -> Iterator[Problem]:
    if run.watchdog.step_s <= run.watchdog.data_s:
        yield (
            ("watchdog", "step_s"),
            f"must be above data_s = {run.watchdog.data_s:g}, got {run.watchdog.step_s:g}: in a step others wait for a rank without data",
        )
