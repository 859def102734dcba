"""The recipe: everything about a run that DeepSpeed's JSON does not own, typed, complete and refused early.

``load_run_config`` reads a YAML recipe, applies ``key=value`` overrides and returns a frozen ``RunConfig``, or raises one
``ConfigError`` with every problem found. ZeRO stage, precision and loss scale belong to ``ds_configs/`` (see ``train.ds_config``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from train.document import ConfigError, Key, Problem, did_you_mean, dotted, read_yaml, show, write_yaml
from train.explain import PROBLEMS, explain

__all__ = ["ConfigError", "RunConfig", "load_run_config"]

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One section of the recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The ViT backbone."""

    name: str = "vit_b"  # a preset of model.vit
    embedding_size: PositiveInt = 512  # D
    mask_ratio: Fraction = 0.0  # share of the 144 tokens dropped in training
    drop_path: Fraction | None = None  # rate of the last block; null: the preset's
    activation_checkpointing: bool = False  # recompute the blocks in backward: less memory, a third more compute
    compile: bool = False  # torch.compile: fused kernels, rounded otherwise; needs a compiler, a minute at the start, and ZeRO 1 or 2


class MarginConfig(Section):
    """Target logit: s (cos(m1 theta + m2) - m3), METHOD equation 12."""

    m1: Annotated[float, Field(ge=1)] = 1.0  # factor (SphereFace)
    m2: Annotated[float, Field(ge=0, lt=math.pi)] = 0.0  # radians (ArcFace)
    m3: Probability = 0.4  # cosine (CosFace)
    curricular: bool = False  # hard negatives count for more, as in CurricularFace


class HeadConfig(Section):
    """The Partial-FC head. The number of classes comes from the data."""

    margin: MarginConfig = MarginConfig()
    scale: Annotated[float, Field(gt=0, le=128)] = 64.0  # s
    margin_gradient: Literal["exact", "straight_through"] = "exact"  # d logit/d cos: the true derivative, or s
    optimizer: Literal["row_sparse", "dense"] = "row_sparse"  # AdamW on the scored rows, or on all rows
    # Operands of the head's matrix products; sums are float32. auto: bfloat16 on a GPU unless DeepSpeed's precision is fp32, else float32.
    product_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Samples of the global micro-batch scored at a time: more memory, fewer passes over the centers. null: 512 on a CPU, 4096 on a GPU.
    chunk_rows: PositiveInt | None = None


class AugmentConfig(Section):
    """Training augmentation; the fields of data_pipeline.loader.Augment."""

    flip: Probability = 0.5  # probability of a mirror image
    shift_px: Annotated[int, Field(ge=0, le=56)] = 0  # translation, uniform in +-shift_px
    brightness: Fraction = 0.0  # factor, uniform in 1 +- brightness


class DataConfig(Section):
    """The training records."""

    path: Path  # folder of record shards, relative to the working directory
    num_threads: PositiveInt = 2  # decoding threads per rank
    min_images_per_identity: PositiveInt = 1  # smaller identities are left out
    augment: AugmentConfig = AugmentConfig()


class BatchConfig(Section):
    """Batch sizes. Global batch = micro_batch_size x grad_accum_steps x world_size."""

    micro_batch_size: Annotated[int, Field(ge=2)] = 64  # images per rank and forward pass; BatchNorm needs two
    grad_accum_steps: PositiveInt = 1  # forward passes per optimizer step


class OptimizerConfig(Section):
    """AdamW, for the backbone and (lr, weight_decay, betas, eps) for the class centers."""

    impl: Literal["torch", "deepspeed", "apex"] = "torch"  # whose AdamW runs the backbone
    lr: PositiveFloat = 1e-3  # at the end of warm-up
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_grad_norm: NonNegativeFloat = 5.0  # global L2 norm of the backbone's gradient; 0: off


class ScheduleConfig(Section):
    """Learning rate: linear warm-up, then decay to final_lr at the last step."""

    warmup_epochs: NonNegativeFloat = 0.0  # at most one of the two is set
    warmup_steps: NonNegativeInt | None = None  # optimizer steps
    decay: Literal["linear", "polynomial"] = "linear"
    power: PositiveFloat = 2.0  # of the polynomial
    final_lr: NonNegativeFloat = 0.0


class StageConfig(Section):
    """One stage of the run: how long, and what the head does meanwhile."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    epochs: PositiveInt | None = None  # exactly one of epochs and steps is set
    steps: PositiveInt | None = None  # optimizer steps
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the class centers scored per step
    # Scored against: the class centers, or these and the expectations (pco, pco_shared, epl), or the expectations alone (replace).
    centers: Literal["learned", "pco", "pco_shared", "epl", "replace"] = "learned"
    update_expectation: bool = False  # move the expectations with every applied step


class CheckpointConfig(Section):
    """When to save. Stage ends and the end of the run always do."""

    every_steps: PositiveInt | None = None  # optimizer steps; null: only at those ends
    keep_last: PositiveInt = 3  # older ones are deleted


class MetricsConfig(Section):
    """The Prometheus exporter and the log."""

    host: str = "127.0.0.1"  # address to listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 9400  # the exporter of local_rank r listens on port + r; 0: no exporter
    log_every: PositiveInt = 10  # optimizer steps per log line


class EvalConfig(Section):
    """Pair verification at the end of training."""

    images: Path  # folder of aligned 112 x 112 images
    pairs: Path  # pairs.txt in LFW's format


class RunConfig(Section):
    """A complete, resolved recipe."""

    seed: NonNegativeInt = 0
    output: Path  # run directory: checkpoints, log, resolved recipe
    resume: Literal["auto", "required", "never"] = "auto"  # go on from output's latest checkpoint: if there is one, or else fail, or never
    epochs: PositiveInt | None = None  # optional check: the stages' epochs must add up to it
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    eval: EvalConfig | None = None

    def global_batch_size(self, world_size: int) -> int:
        """Images per optimizer step over all ranks."""
        return self.batch.micro_batch_size * self.batch.grad_accum_steps * world_size

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; ``load_run_config`` reads it back as an equal object."""
        return write_yaml(self.model_dump(mode="json"))

    def mathematics(self) -> dict[str, Any]:
        """The fields that change what is computed, as JSON values.

        Left out: where things lie (output, data.path: the loader's fingerprint tells data sets apart), how a run is watched, saved
        and evaluated (resume, metrics, checkpoint, eval), and what changes speed alone (data.num_threads, model.activation_checkpointing).
        """
        return self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(("output", "resume", "metrics", "checkpoint", "eval"), True),
                "data": {"path", "num_threads"},
                "model": {"activation_checkpointing"},
            },
        )

    def recipe_hash(self) -> str:
        """SHA-256 (hex) over :meth:`mathematics`."""
        return hashlib.sha256(json.dumps(self.mathematics(), sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        problems = [*_preset_problems(self), *_schedule_problems(self), *_stage_problems(self)]
        if problems:
            text = "; ".join(f"{dotted(key)}: {message}" for key, message in problems)
            raise PydanticCustomError(PROBLEMS, "{text}", {"text": text, "problems": problems})
        return self


def _preset_problems(run: RunConfig) -> Iterator[Problem]:
    from model.vit import PRESETS  # here, so that reading the schema does not import torch

    if run.model.name not in PRESETS:
        known = ", ".join(PRESETS)
        yield ("model", "name"), f"must be one of {known}, got {show(run.model.name)}{did_you_mean(run.model.name, PRESETS)}"


def _schedule_problems(run: RunConfig) -> Iterator[Problem]:
    schedule, stages = run.schedule, run.stages
    if schedule.final_lr > run.optimizer.lr:
        yield ("schedule", "final_lr"), f"must not exceed optimizer.lr = {run.optimizer.lr:g}, got {schedule.final_lr:g}"
    if schedule.warmup_epochs and schedule.warmup_steps:
        both = f"{schedule.warmup_steps} while warmup_epochs is {schedule.warmup_epochs:g}"
        yield ("schedule", "warmup_steps"), f"is {both}; give one of the two"
    # A run of epochs and steps mixed, or warmed up in the other unit, has no length before the data is opened.
    for unit, warmup in (("epochs", schedule.warmup_epochs), ("steps", schedule.warmup_steps or 0)):
        lengths = [getattr(stage, unit) for stage in stages]
        if None not in lengths and warmup > sum(lengths):
            yield ("schedule", f"warmup_{unit}"), f"is {warmup:g}, longer than the whole run of {sum(lengths)} {unit}"
    if run.epochs is not None:
        lengths = [stage.epochs for stage in stages]
        parts = " + ".join(f"{stage.name} {stage.epochs}" for stage in stages)
        if None in lengths:
            yield ("epochs",), "cannot be checked, because a stage is given in steps; remove it"
        elif sum(lengths) != run.epochs:
            yield ("epochs",), f"is {run.epochs}, but the stages' epochs add up to {sum(lengths)} ({parts})"


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
        expectation_exists |= stage.update_expectation
        if stage.centers != "learned" and not expectation_exists:
            yield (*key, "centers"), f"{stage.centers} needs expectations: set update_expectation: true in this stage or an earlier one"


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides such as ``data.path=OUT`` or ``stages.0.epochs=1`` (values are YAML), last one wins.

    Raises: ConfigError with one line per problem, each naming the key, what was expected and found, and the file's line or
    ``(command line)``. Checks that compare fields are made once every field by itself is good.
    """
    document = read_yaml(Path(path))
    problems: list[str] = []
    for assignment in overrides:
        try:
            document.override(assignment)
        except ConfigError as error:
            problems += error.problems
    try:
        # Strict JSON mode: no "64" for 64 and no 1 for true, yet text for a Path and a list for a tuple.
        run = RunConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise ConfigError(problems + explain(error, RunConfig, document)) from None
    if problems:
        raise ConfigError(problems)
    return run
