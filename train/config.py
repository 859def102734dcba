"""The recipe: everything about a run that DeepSpeed's JSON does not own, typed, complete and refused early.

``load_run_config`` reads a YAML recipe, applies ``key=value`` overrides and returns a frozen ``RunConfig``, or raises one
``ConfigError`` with every problem found. ZeRO stage, precision and loss scale belong to ``ds_configs/`` (see ``train.ds_config``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from train.agreement import contradictions
from train.document import ConfigError, Document, dotted, read_recipe, write_yaml
from train.explain import PROBLEMS, explain
from train.margins import Margin, MarginSection, UnifiedMargin
from train.redact import redact
from train.section import Fraction, Probability, Seconds, Section

__all__ = ["ConfigError", "RunConfig", "load_run_config"]


class ModelConfig(Section):
    """The ViT backbone."""

    name: str = "vit_b"  # a preset of model.vit
    embedding_size: PositiveInt = 512  # D
    # Begin with these weights: whatever eval.weights opens, of this preset and size. Rank 0 reads them, and only where a run begins: one
    # that goes on takes its checkpoint's. null: random.
    init_from: Path | None = None
    mask_ratio: Fraction = 0.0  # share of the 144 tokens dropped in training
    drop_path: Fraction | None = None  # rate of the last block; null: the preset's
    activation_checkpointing: bool = False  # recompute the blocks in backward: less memory, a third more compute
    compile: bool = False  # torch.compile: fused kernels, rounded otherwise; needs a compiler, a minute at the start, and ZeRO 1 or 2
    ema_decay: Fraction | None = None  # weight of the past in an exponential mean of the weights, kept beside them; null: none is kept


class HeadConfig(Section):
    """The Partial-FC head. The number of classes comes from the data."""

    margin: Margin = UnifiedMargin(m3=0.4)  # of stages that name none
    scale: Annotated[float, Field(gt=0, le=128)] = 64.0  # s
    margin_gradient: Literal["exact", "straight_through"] = "exact"  # d logit/d cos: the true derivative, or s
    # softmax: over the scored classes. uniface: every class against one learned threshold (unified cross-entropy).
    loss: Literal["softmax", "uniface"] = "softmax"
    # Negatives above this cosine are left out, because they may be the true class of a wrong label; null: none are.
    interclass_filter: Annotated[float, Field(gt=0, lt=1)] | None = None
    # What the class centers begin with where a run begins: random directions, or the mean of the embeddings that the initial backbone gives
    # the images of the class, for which all images are read once before the first step; it needs model.init_from. See
    # train.initial_centers.
    init_centers: Literal["random", "class_means"] = "random"
    optimizer: Literal["row_sparse", "dense"] = "row_sparse"  # AdamW on the scored rows, or on all rows
    # Operands of the head's matrix products; sums are float32. auto: bfloat16 on a GPU unless DeepSpeed's precision is fp32, else float32.
    product_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Samples of the global micro-batch scored at a time: more memory, fewer passes over the centers. null: 512 on a CPU, 4096 on a GPU.
    chunk_rows: PositiveInt | None = None


class AugmentConfig(Section):
    """Training augmentation; the fields of data_pipeline.augment.Augment."""

    downscale: Probability = 0.0  # probability of shrinking to 56 to 89 pixels and back
    blur: Probability = 0.0  # probability of a Gaussian blur over 3 or 5 pixels
    color: Probability = 0.0  # probability of another hue (up to 20 degrees) and saturation (1 to 1.2)
    gray: Probability = 0.0  # probability of no color
    brightness: Probability = 0.0  # factor, uniform in 1 +- brightness
    shift_px: Annotated[int, Field(ge=0, le=56)] = 0  # translation, uniform in +-shift_px
    erase: Probability = 0.0  # probability of a grey rectangle of 2 to 20 % of the image
    flip: Probability = 0.5  # probability of a mirror image


class DecodeConfig(Section):
    """Where JPEGs are decoded in a run on GPUs; the fields of data_pipeline.graph.Decode."""

    device: Literal["mixed", "cpu"] = "mixed"  # mixed: on the GPU; cpu: there, and only normalised on the GPU
    hw_load: Probability = 0.9  # share of a batch for the GPU's JPEG unit, where it has one; mixed alone


class DataConfig(Section):
    """The training records."""

    path: Path  # folder of record shards, relative to the working directory
    # table: every epoch a new order of all images, the same on any number of ranks. reader: DALI's record reader, which reads
    # sequentially and shuffles within a buffer.
    backend: Literal["table", "reader"] = "table"
    max_bad_records: NonNegativeInt = 100  # more damaged records on one rank stop the run; until then another image takes the place of each
    num_threads: PositiveInt = 2  # decoding threads per rank
    min_images_per_identity: PositiveInt = 1  # smaller identities are left out
    # What the data must hold after that; null: whatever it does. With them `train plan` needs no data.
    num_images: PositiveInt | None = None
    num_classes: PositiveInt | None = None
    augment: AugmentConfig = AugmentConfig()
    decode: DecodeConfig = DecodeConfig()


class BatchConfig(Section):
    """Batch sizes. Global batch = micro_batch_size x grad_accum_steps x world_size."""

    micro_batch_size: Annotated[int, Field(ge=2)] = 64  # images per rank and forward pass; BatchNorm needs two
    grad_accum_steps: PositiveInt | None = None  # forward passes per optimizer step; null: 1, or what global_batch_size asks for
    global_batch_size: PositiveInt | None = None  # images per optimizer step over all ranks, whatever their number; at most one of the two

    def accumulation(self, world_size: int, key: str = "batch") -> int:
        """Forward passes per optimizer step; ``key``: where the section stands in the recipe.

        Raises: ConfigError if global_batch_size is no multiple of what all ranks take at once.
        """
        if self.global_batch_size is None:
            return self.grad_accum_steps or 1
        at_once = self.micro_batch_size * world_size
        if self.global_batch_size % at_once:
            share, rest = divmod(self.global_batch_size, world_size)
            sizes = [size for size in range(2, self.micro_batch_size + 1) if not rest and share % size == 0]
            hint = f"; {key}.micro_batch_size={sizes[-1]} would do" if sizes else f"; {world_size} ranks cannot share it evenly"
            raise ConfigError(
                f"{key}.global_batch_size: {self.global_batch_size} is no multiple of micro_batch_size x world_size = "
                f"{self.micro_batch_size} x {world_size}{hint}"
            )
        return self.global_batch_size // at_once

    def images_per_step(self, world_size: int) -> int:
        """The global batch. Raises ConfigError as :meth:`accumulation`."""
        return self.micro_batch_size * self.accumulation(world_size) * world_size


class OptimizerConfig(Section):
    """AdamW, for the backbone and (lr, weight_decay, betas, eps) for the class centers."""

    impl: Literal["torch", "deepspeed", "apex"] = "torch"  # whose AdamW runs the backbone
    lr: PositiveFloat = 1e-3  # at the end of warm-up
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_grad_norm: NonNegativeFloat = 5.0  # global L2 norm of the backbone's gradient; 0: off
    decay_all: bool = False  # weight decay on norms, biases, pos_embed and mask_token as well: the field's way


class ScheduleConfig(Section):
    """Learning rate: linear warm-up, to optimizer.lr in the run's own, then decay to final_lr at the last step."""

    warmup_epochs: NonNegativeFloat = 0.0  # at most one of the two is set
    warmup_steps: NonNegativeInt | None = None  # optimizer steps
    decay: Literal["linear", "polynomial"] = "linear"
    power: PositiveFloat = 2.0  # of the polynomial
    final_lr: NonNegativeFloat = 0.0


class SegmentConfig(ScheduleConfig):
    """A learning-rate curve of one stage's own."""

    lr: PositiveFloat  # at the end of its warm-up


class UntilConfig(Section):
    """What ends a stage before its time: the mean square of cos_y over the global batch, smoothed, reaches a threshold."""

    target_cosine_square: Annotated[float, Field(gt=0, lt=1)]  # the threshold
    smoothing: Fraction = 0.99  # weight of the past in the exponential mean, per optimizer step; it begins with the stage
    check_every: PositiveInt = 10  # optimizer steps of the stage from look to look; the host waits for the device there


class StageConfig(Section):
    """One stage of the run: how long, and what the head does meanwhile."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    epochs: PositiveInt | None = None  # exactly one of epochs and steps is set
    steps: PositiveInt | None = None  # optimizer steps
    until: UntilConfig | None = None  # may end the stage earlier: the next one takes over what is left of its images
    margin: Margin | None = None  # null: head.margin
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the class centers scored per step
    # Scored against: the class centers (vpl: drawn towards the last embedding of their class), or these and the expectations (pco,
    # pco_shared, epl), or the expectations alone (replace).
    centers: Literal["learned", "pco", "pco_shared", "epl", "replace", "vpl"] = "learned"
    update_expectation: bool = False  # move the expectations with every applied step
    # The class centers alone learn: nothing of the backbone changes, not even BatchNorm's running statistics (see train.backbone). A first
    # stage of this kind needs model.init_from; without a schedule of its own it uses up the run's warm-up.
    freeze_backbone: bool = False
    batch: BatchConfig | None = None  # null: the run's
    schedule: SegmentConfig | None = None  # a curve over this stage alone; null: the run's, which all such stages share


class GuardConfig(Section):
    """What a run does about steps and ranks that go wrong. A step whose gradient is not finite on any rank is always skipped on all."""

    max_skipped: PositiveInt = 50  # steps in a row that are skipped before the run gives up; fp16 finds its loss scale within 20
    # What it does then. stop: end with an error. rollback: go back to the newest checkpoint from before them, and on with other images.
    then: Literal["stop", "rollback"] = "stop"
    max_rollbacks: PositiveInt = 3  # more end the run
    spike_factor: Annotated[float, Field(gt=1)] | None = None  # a loss above this times its running mean is skipped as well; null: none is
    # Optimizer steps from one comparison of the ranks' weights to the next: see train.replicas; null: none is made.
    replica_check_steps: PositiveInt | None = 1000


class CheckpointConfig(Section):
    """When to save. Stage ends and the end of the run always do. Which to keep: all that any of the three asks for."""

    every_steps: PositiveInt | None = None  # optimizer steps; null: only at those ends
    keep_last: PositiveInt = 3  # the newest ones
    keep_every_steps: PositiveInt | None = None  # those of steps that are a multiple of it, but 0; null: none
    keep_best: NonNegativeInt = 0  # those of the highest pair accuracy, mean over the sets; needs eval.every_checkpoint
    grace_s: PositiveFloat = 25.0  # seconds from a signal to stop until the process ends, whatever it does then; launchers kill after 30


class TlsConfig(Section):
    """PEM files with which the exporter speaks TLS."""

    certificate: Path
    key: Path
    client_ca: Path | None = None  # only clients with a certificate that it signed are answered; null: all are


class MetricsConfig(Section):
    """The Prometheus exporter, the log, and what else shows a run."""

    host: str = "127.0.0.1"  # address to listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 9400  # the exporter of local_rank r listens on port + r; 0: no exporter
    tls: TlsConfig | None = None  # null: plain HTTP
    log_every: PositiveInt = 10  # optimizer steps per log line
    # 1e12 operations/s of the GPU in the run's precision, for the model utilization; null: its data sheet's, if it is known here.
    peak_tflops: PositiveFloat | None = None
    live: bool = True  # a live view in place of log lines, where standard output is a terminal
    tensorboard: bool = False  # the metrics as TensorBoard's scalars too, in output/tensorboard


class WatchdogConfig(Section):
    """How long a rank may stay in a phase of the run. After that all ranks tell where they stand and end with exit code 3."""

    start_s: Seconds = 1800.0  # everything before the first step: opening the data, building, loading a checkpoint; a batch of class means
    data_s: Seconds = 300.0  # waiting for a batch, which each rank does by itself
    step_s: Seconds = 600.0  # head, forward, backward, optimizer and what lies between them: the others wait there for a rank without data
    checkpoint_s: Seconds = 1800.0  # saving
    evaluate_s: Seconds = 1800.0  # a batch of an evaluation between steps, or what follows its last batch
    end_s: Seconds = 1800.0  # the same at the end of the run, and writing its summary and report

    def key(self, phase: str) -> str:
        """The field whose deadline ``phase`` has."""
        return f"{phase}_s" if f"{phase}_s" in type(self).model_fields else "step_s"

    def deadline(self, phase: str) -> float:
        """Seconds."""
        return getattr(self, self.key(phase))

    @property
    def shortest_s(self) -> float:
        return min(seconds for _, seconds in self)

    @property
    def group_timeout(self) -> timedelta:
        """Of every process group. It is the second line: the watchdog, which knows who is stuck, speaks before."""
        return timedelta(seconds=max(seconds for _, seconds in self) + 60)


class EvalConfig(Section):
    """Pair verification by all ranks, at the end of training and, if asked for, in between. Every node needs the sets.

    A request to stop ends an evaluation between steps without a result, so that there is time to save.
    """

    images: Path | None = None  # folder of aligned 112 x 112 images
    pairs: Path | None = None  # pairs of them: LFW's pairs.txt, or another list that eval.pair_lists knows
    packs: tuple[Path, ...] = ()  # more sets: NAME.pairs.safetensors, or the field's NAME.bin
    every_steps: PositiveInt | None = None  # optimizer steps; null: only where the next one says, and at the end
    every_checkpoint: bool = False  # at every checkpoint that a stage or checkpoint.every_steps asks for: what keep_best compares


class RunConfig(Section):
    """A complete, resolved recipe."""

    seed: NonNegativeInt = 0
    output: Path  # run directory: checkpoints, log, resolved recipe
    # Go on from output's newest checkpoint: if there is one (auto), or else fail (required), or never. branch: as required, but stages that
    # had not begun may differ, in a copy of the output of another run.
    resume: Literal["auto", "required", "never", "branch"] = "auto"
    epochs: PositiveInt | None = None  # optional check: the stages' epochs must add up to it
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    eval: EvalConfig | None = None

    def stage_batch(self, index: int) -> BatchConfig:
        """The batch of stage ``index``."""
        return self.stages[index].batch or self.batch

    def stage_margin(self, index: int) -> MarginSection:
        """The margin of stage ``index``."""
        return self.stages[index].margin or self.head.margin

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; ``load_run_config`` reads it back as an equal object, if it holds no secret."""
        return write_yaml(redact(self.model_dump(mode="json")))

    def mathematics(self, *, defaults: bool = True) -> dict[str, Any]:
        """The fields that change what is computed, as JSON values; with ``defaults=False`` those that are not at their default.

        Left out: where things lie (output, data.path: the loader's fingerprint tells data sets apart; model.init_from: the weights that
        came of it are in every checkpoint, with their digest, and a run goes on without the file), how a run is watched, guarded, saved
        and evaluated (resume, guard, metrics, watchdog, checkpoint, eval), what is only checked (data.num_images, data.num_classes), and
        what changes speed alone (data.num_threads, model.activation_checkpointing) or when a run gives up (data.max_bad_records). A run
        that a guard stopped may thus go on with another one. The batch sections count as the images of a step, see train.build.
        """
        return self.model_dump(
            mode="json",
            exclude_defaults=not defaults,
            exclude={
                **dict.fromkeys(("output", "resume", "guard", "metrics", "watchdog", "checkpoint", "eval"), True),
                "data": {"path", "num_threads", "num_images", "num_classes", "max_bad_records"},
                "model": {"activation_checkpointing", "init_from"},
            },
        )

    def shared_values(self) -> dict[str, Any]:
        """The fields that must be equal on all ranks, as JSON values: all but where things lie on a node."""
        local = {"output": True, "data": {"path", "num_threads"}, "metrics": {"host", "port", "tls"}, "eval": {"images", "pairs", "packs"}}
        return self.model_dump(mode="json", exclude=local)

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        problems = list(contradictions(self))
        if problems:
            text = "; ".join(f"{dotted(key)}: {message}" for key, message in problems)
            raise PydanticCustomError(PROBLEMS, "{text}", {"text": text, "problems": problems})
        return self


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides such as ``data.path=OUT`` or ``stages.0.epochs=1`` (values are YAML), last one wins.

    A recipe may name another as its ``base``, see ``train.document.read_recipe``; overrides come after.

    Raises: ConfigError with one line per problem, each naming the key, what was expected and found, and the file's line or
    ``(command line)``. Checks that compare fields are made once every field by itself is good.
    """
    document = read_recipe(Path(path))
    problems: list[str] = []
    for assignment in overrides:
        try:
            document.override(assignment)
        except ConfigError as error:
            problems += error.problems
    try:
        run = validate(document)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return run


def validate(document: Document) -> RunConfig:
    """The recipe in ``document``. Raises: ConfigError with one line per problem."""
    try:
        # Strict JSON mode: no "64" for 64 and no 1 for true, yet text for a Path and a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, document)) from None
