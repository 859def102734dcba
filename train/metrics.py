"""What a run reports: one table of metrics, a Prometheus exporter per rank, a JSON line per log step, and the phase timer.

Prometheus scrapes ``http://host:port + local_rank/metrics``; which rank that is comes from its service discovery, so no series carries
a rank. ``metrics.jsonl`` (rank 0) holds the same numbers for people and tests.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from train.document import ConfigError

PHASES = ("data", "forward", "head", "backward", "optimizer", "checkpoint", "total")
PORTS_TO_TRY = 64


@dataclass(frozen=True)
class MetricSpec:
    """One row of the table. ``field`` is the attribute of StepRecord that feeds it; counters add it up."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    meaning: str
    field: str = ""
    labels: tuple[str, ...] = ()


TABLE = (
    MetricSpec("lvface_images_total", "counter", "images", "Images trained on, all ranks together, since this process started", "images"),
    MetricSpec("lvface_steps_total", "counter", "steps", "Optimizer steps taken or skipped since this process started", "steps"),
    MetricSpec(
        "lvface_skipped_steps_total", "counter", "steps", "Those skipped: a gradient was not finite, or the loss a spike", "skipped_steps"
    ),
    MetricSpec("lvface_step", "gauge", "steps", "Optimizer steps since the start of the run, earlier processes included", "step"),
    MetricSpec("lvface_epoch", "gauge", "epochs", "Passes over the training images since the start of the run", "epoch"),
    MetricSpec("lvface_stage", "gauge", "index", "Index of the current stage; its name is the label", "stage", ("name",)),
    MetricSpec("lvface_sample_rate", "gauge", "ratio", "Share of the class centers scored per step", "sample_rate"),
    MetricSpec("lvface_loss", "gauge", "nats", "Training loss, mean over the last log window", "loss"),
    MetricSpec(
        "lvface_target_cosine",
        "gauge",
        "cosine",
        "Mean cosine of embedding and own class center (under replace: own expectation)",
        "target_cosine",
    ),
    MetricSpec("lvface_target_cosine_square", "gauge", "1", "Mean square of that cosine, which may end a stage", "target_cosine_square"),
    MetricSpec("lvface_target_cosine_smoothed", "gauge", "1", "That square, smoothed as the stage's end asks", "target_cosine_smoothed"),
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
    MetricSpec("lvface_curricular_t", "gauge", "1", "t of CurricularFace", "curricular_t"),
    MetricSpec("lvface_uniface_bias", "gauge", "1", "Threshold b of UniFace, in logits", "uniface_bias"),
    MetricSpec("lvface_norm_mean", "gauge", "1", "Running mean of the embeddings' norms (AdaFace)", "norm_mean"),
    MetricSpec("lvface_norm_std", "gauge", "1", "Running standard deviation of the embeddings' norms (AdaFace)", "norm_std"),
    MetricSpec("lvface_learning_rate", "gauge", "1", "Learning rate of the last step", "learning_rate"),
    MetricSpec("lvface_gradient_norm", "gauge", "1", "L2 norm of the backbone's gradient before clipping", "gradient_norm"),
    MetricSpec("lvface_head_gradient_norm", "gauge", "1", "L2 norm of the class centers' gradient over all shards", "head_gradient_norm"),
    MetricSpec("lvface_loss_scale", "gauge", "1", "Factor on the loss under fp16; 1 in other precisions", "loss_scale"),
    MetricSpec("lvface_bad_records", "gauge", "records", "Damaged records that this rank has met and replaced by others", "bad_records"),
    MetricSpec("lvface_images_per_second", "gauge", "images/s", "Throughput of all ranks in the last log window", "images_per_second"),
    MetricSpec(
        "lvface_step_seconds",
        "gauge",
        "seconds",
        "Mean time per step in a log window by phase; total is the whole",
        "step_seconds",
        ("phase",),
    ),
    MetricSpec("lvface_eta_seconds", "gauge", "seconds", "Time to the end of the run at the present throughput", "eta_seconds"),
    MetricSpec("lvface_checkpoint_step", "gauge", "steps", "Step of the newest complete checkpoint; rank 0 alone", "checkpoint_step"),
    MetricSpec(
        "lvface_checkpoint_blocked_seconds",
        "gauge",
        "seconds",
        "Time for which the newest checkpoint held up training",
        "checkpoint_blocked_seconds",
    ),
    MetricSpec(
        "lvface_checkpoint_write_seconds",
        "gauge",
        "seconds",
        "Time from its begin until this rank's file, on rank 0 all of it, was on the disk",
        "checkpoint_write_seconds",
    ),
    MetricSpec(
        "lvface_checkpoint_free_bytes",
        "gauge",
        "bytes",
        "Free where the checkpoints lie; rank 0 alone",
        "checkpoint_free_bytes",
    ),
    MetricSpec("lvface_checkpoint_score", "gauge", "ratio", "Pair accuracy of the newest checkpoint; rank 0 alone", "checkpoint_score"),
    MetricSpec("lvface_build_info", "gauge", "1", "Always 1; what this process runs", "", ("world_size", "zero_stage", "precision")),
)


def metrics_table() -> str:
    """The table as Markdown, for the documentation."""
    rows = ["| metric | type | unit | meaning |", "|---|---|---|---|"]
    for spec in TABLE:
        labels = f"{{{', '.join(spec.labels)}}}" if spec.labels else ""
        rows.append(f"| `{spec.name}{labels}` | {spec.kind} | {spec.unit} | {spec.meaning} |")
    return "\n".join(rows) + "\n"


@dataclass(frozen=True)
class BuildInfo:
    """Labels of lvface_build_info."""

    world_size: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class StepRecord:
    """What one log window has to say. Units and meanings: TABLE."""

    step: int
    epoch: float
    stage: int
    stage_name: str
    sample_rate: float
    loss: float
    target_cosine: float
    target_cosine_square: float
    learning_rate: float
    gradient_norm: float
    head_gradient_norm: float
    loss_scale: float
    bad_records: int  # of this rank, since the start of the run
    images: int  # in this window, all ranks together
    steps: int  # in this window, skipped ones included
    skipped_steps: int  # in this window
    images_per_second: float
    step_seconds: Mapping[str, float]  # phase -> seconds, as PhaseTimer.window returns it
    eta_seconds: float
    # NaN where a stage has no such thing
    target_cosine_smoothed: float = math.nan
    expectation_cosine: float = math.nan
    expectation_classes: float = math.nan
    center_expectation_cosine: float = math.nan
    expectation_drift: float = math.nan
    curricular_t: float = math.nan
    uniface_bias: float = math.nan
    norm_mean: float = math.nan
    norm_std: float = math.nan
    # NaN before the first checkpoint
    checkpoint_step: float = math.nan
    checkpoint_blocked_seconds: float = math.nan
    checkpoint_write_seconds: float = math.nan
    checkpoint_free_bytes: float = math.nan
    checkpoint_score: float = math.nan


class Metrics:
    """Publishes StepRecords: to Prometheus from every rank, to a JSON-lines file from rank 0.

    Args:
        jsonl_path: appended to; None: no file.
        host, port: where to listen; this rank takes ``port + local_rank``, or the next free port (with a warning). port 0: no exporter.
    Attributes: ``problem``, why the file could not be written at the last step; what is missing in it follows at the next.
    Raises: ConfigError when the address cannot be listened on.
    """

    def __init__(self, jsonl_path: Path | None, host: str, port: int, rank: int, local_rank: int, build: BuildInfo):
        self._exported, self._path = _Exported(build), jsonl_path
        self._file = _open_for_append(jsonl_path) if jsonl_path is not None and rank == 0 else None
        self._server: Any = None
        self.problem: str | None = None
        self.port: int | None = None  # where the exporter really listens
        if port:
            registry = CollectorRegistry()
            registry.register(self._exported)
            self._server, self._thread, self.port = _serve(registry, host, port + local_rank)

    def record_step(self, record: StepRecord) -> None:
        """Publish one log window. A number that is not finite becomes null in the file; Prometheus takes it as it is."""
        self._exported.update(record)
        if self._file is not None:
            line = {"time": time.time(), **finite_or_null(asdict(record))}  # time: seconds since 1970
            try:
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()
                self.problem = None
            except OSError as error:
                self.problem = f"{self._path}: cannot be written ({error.strerror}); make that possible, and start again"

    def require_written(self) -> None:
        """Raises OSError unless the file holds every record."""
        if self.problem:
            raise OSError(self.problem)

    def close(self) -> None:
        """Stop the exporter, free its port, close the file. A second call does nothing."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
        if self._file is not None:
            self._file.close()
            self._file = None


class _Exported:
    """The present values, as a prometheus_client collector. A scrape sees one record whole, never half of the next."""

    def __init__(self, build: BuildInfo):
        labels = tuple(str(getattr(build, field.name)) for field in fields(build))
        self._values: dict[str, dict[tuple[str, ...], float]] = {
            **{spec.name: {(): 0.0} for spec in TABLE if spec.kind == "counter"},
            "lvface_build_info": {labels: 1.0},
        }

    def update(self, record: StepRecord) -> None:
        values = dict(self._values)
        for spec in TABLE:
            if not spec.field:
                continue
            value = getattr(record, spec.field)
            if spec.kind == "counter":
                values[spec.name] = {(): values[spec.name][()] + value}
            elif spec.labels == ("phase",):
                values[spec.name] = {(phase,): seconds for phase, seconds in value.items()}
            else:
                values[spec.name] = {(record.stage_name,) if spec.labels else (): float(value)}
        self._values = values

    def collect(self) -> Iterable[Metric]:
        values = self._values
        for spec in TABLE:
            family = (CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily)(
                spec.name, f"{spec.meaning} [{spec.unit}]", labels=spec.labels
            )
            for labels, value in values.get(spec.name, {}).items():
                family.add_metric(labels, value)
            yield family


def _serve(registry: CollectorRegistry, host: str, wanted: int) -> tuple[Any, Any, int]:
    for port in range(wanted, min(wanted + PORTS_TO_TRY, 65536)):
        try:
            server, thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ConfigError(f"metrics.host, metrics.port: cannot listen on {host}:{port}: {error.strerror}") from None
        if port != wanted:
            logging.getLogger(__name__).warning("port %d is taken: metrics are at http://%s:%d/metrics", wanted, host, port)
        return server, thread, port
    raise ConfigError(f"metrics.port: no free port on {host} among the {PORTS_TO_TRY} from {wanted}; choose another, or 0 for no exporter")


def _open_for_append(path: Path) -> Any:
    """Open for appending; of a line that a killed run or a full disk has torn nothing stays, so that each one can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.tell()
        while end and (file.seek(end - 1), file.read(1))[1] != b"\n":
            end -= 1
        file.truncate(end)
    return path.open("a", encoding="utf-8")


def finite_or_null(value: Any) -> Any:
    """``value`` for JSON: in it and the mappings inside it None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PhaseTimer:
    """Mean seconds per step and phase over a log window, without making the device wait.

    ``with timer.phase("forward"): ...`` may be entered several times per step (accumulation). On a CPU the host's clock is read. On CUDA
    events are recorded in the stream and read one window later, when they have long been reached; the "data" phase then shows what the
    device really waited, not what the host did meanwhile. The CUDA clock has not been run on a GPU yet.
    """

    def __init__(self, device_type: Literal["cpu", "cuda"]):
        self._clock = _CudaClock() if device_type == "cuda" else _HostClock()
        self._spans: list[tuple[str, Any, Any]] = []
        self._unread: list[tuple[list[tuple[str, Any, Any]], int]] = []  # closed windows and their step counts, oldest first
        self._window_start = self._clock.mark()

    def restart(self) -> None:
        """Leave out what came before the first step."""
        self._spans, self._window_start = [], self._clock.mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as ``name``, one of PHASES other than "total"."""
        start = self._clock.mark()
        yield
        self._spans.append((name, start, self._clock.mark()))

    def window(self, steps: int) -> dict[str, float]:
        """Close the window of ``steps`` (> 0) steps and return phase -> mean seconds per step, "total" from window to window.

        On CUDA that is the window before this one; the first call returns an empty dict.
        """
        now = self._clock.mark()
        self._unread.append(([*self._spans, ("total", self._window_start, now)], steps))
        self._spans, self._window_start = [], now
        if len(self._unread) <= self._clock.windows_late:
            return {}
        spans, steps = self._unread.pop(0)
        sums: dict[str, float] = {}
        for name, start, end in spans:
            sums[name] = sums.get(name, 0.0) + self._clock.seconds(start, end)
        return {name: seconds / steps for name, seconds in sums.items()}


class _HostClock:
    windows_late = 0

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    windows_late = 1

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()  # returns at once unless the device is more than a whole window behind
        return start.elapsed_time(end) / 1000
