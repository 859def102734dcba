"""The metrics of a run in one table: names, types, units, meanings; and the record of a log window, from which most are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.observation import COSINE_EDGES

STEP_SECONDS_EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Histogram:
    """Values counted by bucket: those at or below each edge and above the one before; the last bucket is above all edges."""

    counts: Sequence[int]
    total: float | None  # sum of the values; None where some are negative, because Prometheus takes it for a counter

    def __add__(self, other: Histogram) -> Histogram:
        counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        return Histogram(counts, None if self.total is None else self.total + other.total)


@dataclass(frozen=True)
class StepRecord:
    """What one log window has to say. Units and meanings: TABLE. NaN where a stage, a rank or a moment has no such thing."""

    step: int
    target_steps: int
    furthest_step: int  # of the run in any process, rollbacks and restarts included
    epoch: float
    stage: int
    stage_name: str
    restarts: int
    remaining_seconds: float
    images: int  # in this window, all ranks together
    samples: int  # in this window, of this rank
    steps: int  # in this window, skipped ones included
    outcomes: Mapping[str, int]  # steps of this window by outcome
    images_per_second: float  # of all ranks
    step_seconds: Mapping[str, float]  # mean of a step by part, and total
    part_seconds: Mapping[str, float]  # sum over the steps by part
    step_durations: Histogram  # steps of this window, edges STEP_SECONDS_EDGES
    operations: float  # in this window, of this rank
    utilization: float
    memory: Mapping[str, float]
    sample_rate: float
    loss: float
    loss_maximum: float
    target_cosine: float
    target_cosine_square: float
    learning_rate: float
    gradient_norm: float
    head_gradient_norm: float
    loss_scale: float
    head_classes: Mapping[str, float]
    own_center_cosines: Histogram  # samples of this window and rank, edges COSINE_EDGES
    records: Mapping[str, int]  # in this window, of this rank
    bad_records: int  # of this rank, since the start of the run
    record_bytes: int  # in this window, of this rank
    data_queue_batches: int
    hardest_negative_cosine: float = math.nan
    center_norm: float = math.nan
    expectation_updates: int = 0  # in this window, of this rank
    target_cosine_smoothed: float = math.nan
    expectation_cosine: float = math.nan
    expectation_classes: float = math.nan
    center_expectation_cosine: float = math.nan
    expectation_drift: float = math.nan
    curricular_t: float = math.nan
    uniface_bias: float = math.nan
    norm_mean: float = math.nan
    norm_std: float = math.nan
    checkpoint_step: float = math.nan
    checkpoint_timestamp_seconds: float = math.nan
    checkpoint_blocked_seconds: float = math.nan
    checkpoint_write_seconds: float = math.nan
    checkpoint_size_bytes: float = math.nan
    checkpoint_free_bytes: float = math.nan
    checkpoint_score: float = math.nan
    evaluation_step: float = math.nan  # of the newest evaluation
    evaluation_accuracy: Mapping[str, float] = field(default_factory=dict)  # its, by set of pairs

    @property
    def stage_by_name(self) -> dict[str, int]:
        return {self.stage_name: self.stage}

    @property
    def gradient_norms(self) -> dict[str, float]:
        return {"backbone": self.gradient_norm, "head": self.head_gradient_norm}


@dataclass(frozen=True)
class MetricSpec:
    """One row of the table.

    ``field``: the attribute of StepRecord that feeds it: a number, where there is a ``label`` one for each of its values, or a Histogram.
    Counters and histograms add it up. "": it is read when Prometheus asks (train.metrics).
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    field: str = ""
    label: str | tuple[str, ...] = ""  # of several labels the values' keys are tuples
    edges: tuple[float, ...] = ()  # upper ones of a histogram's buckets

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,) if isinstance(self.label, str) and self.label else tuple(self.label)


TABLE = (
    # progress
    MetricSpec("lvface_step", "gauge", "steps", "Optimizer steps since the start of the run, earlier processes included", "step"),
    MetricSpec("lvface_target_steps", "gauge", "steps", "Steps after which the run is over, at the latest", "target_steps"),
    MetricSpec("lvface_epoch", "gauge", "epochs", "Passes over the training images since the start of the run", "epoch"),
    MetricSpec("lvface_stage", "gauge", "index", "Index of the current stage; its name is the label", "stage_by_name", "name"),
    MetricSpec("lvface_phase", "gauge", "1", "1 for the part of the loop that this rank is in at the moment of the scrape", label="phase"),
    MetricSpec(
        "lvface_heartbeat_timestamp_seconds", "gauge", "seconds", "When this rank last entered a phase or got on in a long one, since 1970"
    ),
    MetricSpec(
        "lvface_restarts", "gauge", "starts", "How often the run was started again from a checkpoint, and logged a step", "restarts"
    ),
    MetricSpec("lvface_remaining_seconds", "gauge", "seconds", "Time to the end of the run at the present throughput", "remaining_seconds"),
    # throughput
    MetricSpec("lvface_samples_total", "counter", "images", "Images that this rank has trained on", "samples"),
    MetricSpec(
        "lvface_steps_total", "counter", "steps", "Optimizer steps by outcome: applied, or why they were skipped", "outcomes", "outcome"
    ),
    MetricSpec("lvface_step_duration_seconds", "histogram", "seconds", "Time of a step", "step_durations", edges=STEP_SECONDS_EDGES),
    MetricSpec(
        "lvface_step_part_seconds_total",
        "counter",
        "seconds",
        "Time of the steps by part. comm: waiting for other ranks, wherever that was; on a GPU what its stream waited",
        "part_seconds",
        "part",
    ),
    MetricSpec(
        "lvface_run_time_seconds_total",
        "counter",
        "seconds",
        "Time since this process began by use; repeat: steps that had been taken before a restart or a rollback",
        label="kind",
    ),
    MetricSpec(
        "lvface_model_operations_total", "counter", "operations", "Floating-point operations of backbone and head, this rank", "operations"
    ),
    MetricSpec(
        "lvface_model_utilization_ratio", "gauge", "ratio", "Their rate next to the peak of this GPU (metrics.peak_tflops)", "utilization"
    ),
    # optimisation
    MetricSpec("lvface_loss", "gauge", "nats", "Training loss, mean over the last log window", "loss"),
    MetricSpec("lvface_loss_maximum", "gauge", "nats", "The highest of a step in that window", "loss_maximum"),
    MetricSpec("lvface_learning_rate", "gauge", "1", "Learning rate of the last step", "learning_rate"),
    MetricSpec("lvface_gradient_norm", "gauge", "1", "L2 norm of the gradient over all ranks, before clipping", "gradient_norms", "group"),
    MetricSpec("lvface_loss_scale", "gauge", "1", "Factor on the loss under fp16; 1 in other precisions", "loss_scale"),
    # head
    MetricSpec(
        "lvface_head_classes",
        "gauge",
        "classes",
        "Classes that this rank holds, scored in the last micro-batch, and met in it",
        "head_classes",
        "kind",
    ),
    MetricSpec("lvface_sample_rate", "gauge", "ratio", "Share of the class centers scored per step", "sample_rate"),
    MetricSpec(
        "lvface_target_cosine",
        "gauge",
        "cosine",
        "Mean cosine of embedding and own class center (under replace: own expectation)",
        "target_cosine",
    ),
    MetricSpec("lvface_target_cosine_square", "gauge", "1", "Mean square of that cosine, which may end a stage", "target_cosine_square"),
    MetricSpec("lvface_target_cosine_smoothed", "gauge", "1", "That square, smoothed as the stage's end asks", "target_cosine_smoothed"),
    MetricSpec(
        "lvface_own_center_cosine", "histogram", "cosine", "That cosine of this rank's samples", "own_center_cosines", edges=COSINE_EDGES
    ),
    MetricSpec(
        "lvface_hardest_negative_cosine",
        "gauge",
        "cosine",
        "Mean over some samples of the last step of the highest cosine to another class",
        "hardest_negative_cosine",
    ),
    MetricSpec("lvface_center_norm", "gauge", "1", "Mean L2 norm of the class centers", "center_norm"),
    MetricSpec("lvface_expectation_cosine", "gauge", "cosine", "Mean cosine of embedding and own expectation", "expectation_cosine"),
    MetricSpec("lvface_expectation_classes", "gauge", "classes", "Classes that have an expectation", "expectation_classes"),
    MetricSpec(
        "lvface_center_expectation_cosine",
        "gauge",
        "cosine",
        "Mean cosine of class center and expectation, over those classes",
        "center_expectation_cosine",
    ),
    MetricSpec(
        "lvface_expectation_drift", "gauge", "1", "Mean of 1 - cosine over the expectations that the last step moved", "expectation_drift"
    ),
    MetricSpec("lvface_expectation_updates_total", "counter", "updates", "New values of expectations of this rank", "expectation_updates"),
    MetricSpec("lvface_curricular_t", "gauge", "1", "t of CurricularFace", "curricular_t"),
    MetricSpec("lvface_uniface_bias", "gauge", "1", "Threshold b of UniFace, in logits", "uniface_bias"),
    MetricSpec("lvface_norm_mean", "gauge", "1", "Running mean of the embeddings' norms (AdaFace)", "norm_mean"),
    MetricSpec("lvface_norm_std", "gauge", "1", "Running standard deviation of the embeddings' norms (AdaFace)", "norm_std"),
    # data and memory
    MetricSpec(
        "lvface_records_total",
        "counter",
        "records",
        "Records that this rank trained on, and damaged ones that others took the place of",
        "records",
        "outcome",
    ),
    MetricSpec("lvface_record_bytes_total", "counter", "bytes", "Read from the shards by this rank (backend table)", "record_bytes"),
    MetricSpec("lvface_data_queue_batches", "gauge", "batches", "Batches that are read ahead", "data_queue_batches"),
    MetricSpec(
        "lvface_memory_bytes", "gauge", "bytes", "Memory of the GPU; on a CPU of the process, and in all of the machine", "memory", "kind"
    ),
    # checkpoints and evaluation
    MetricSpec("lvface_checkpoint_step", "gauge", "steps", "Step of the newest complete checkpoint; rank 0 alone", "checkpoint_step"),
    MetricSpec(
        "lvface_checkpoint_timestamp_seconds",
        "gauge",
        "seconds",
        "When it was complete, since 1970; rank 0 alone",
        "checkpoint_timestamp_seconds",
    ),
    MetricSpec("lvface_checkpoint_blocked_seconds", "gauge", "seconds", "For how long it held up training", "checkpoint_blocked_seconds"),
    MetricSpec(
        "lvface_checkpoint_duration_seconds",
        "gauge",
        "seconds",
        "Time from its begin until this rank's file, on rank 0 all of it, was on the disk",
        "checkpoint_write_seconds",
    ),
    MetricSpec("lvface_checkpoint_size_bytes", "gauge", "bytes", "Its size; rank 0 alone", "checkpoint_size_bytes"),
    MetricSpec("lvface_checkpoint_free_bytes", "gauge", "bytes", "Free where checkpoints lie; rank 0 alone", "checkpoint_free_bytes"),
    MetricSpec("lvface_evaluation_step", "gauge", "steps", "Step of the newest evaluation; equal on all ranks, as what it found"),
    MetricSpec("lvface_evaluation_accuracy_ratio", "gauge", "ratio", "Its pair accuracy, by set of pairs", label="set"),
    MetricSpec(
        "lvface_evaluation_true_accept_ratio",
        "gauge",
        "ratio",
        "Share of its genuine pairs accepted, by set and by share of impostors accepted",
        label=("set", "false_accept_rate"),
    ),
    MetricSpec("lvface_build_info", "gauge", "1", "Always 1; world_size, zero_stage and precision of this process"),
)


def metrics_table() -> str:
    """The table as Markdown, for the documentation."""
    rows = ["| metric | type | unit | meaning |", "|---|---|---|---|"]
    for spec in TABLE:
        label = f"{{{', '.join(spec.labels)}}}" if spec.label else ""
        rows.append(f"| `{spec.name}{label}` | {spec.kind} | {spec.unit} | {spec.meaning} |")
    return "\n".join(rows) + "\n"
