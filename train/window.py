"""What happened between two log lines, and the record that is made of it."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.flops import backbone_flops, backbone_forward_flops
from model.vit import PRESETS
from train.accelerators import accelerator_of
from train.config import RunConfig
from train.engine import loss_scale
from train.evaluation import PairVerification
from train.guard import APPLIED, OUTCOMES
from train.metric_table import STEP_SECONDS_EDGES, Histogram, StepRecord
from train.metrics import Value
from train.timing import RunTime
from train.watchdog import PHASES, Watchdog

if TYPE_CHECKING:
    from train.run import Run


# What the time in a phase counts as, until the step is over and its outcome known; of the others: train.
_USE = {"start": "start", "checkpoint": "checkpoint", "evaluate": "evaluate", "end": "evaluate"}


@dataclass
class Window:
    """The steps since the last log line."""

    start: float = field(default_factory=time.monotonic)
    images: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # steps by outcome, one of train.guard.OUTCOMES
    measured: list[Tensor] = field(default_factory=list)  # of each applied step [3]: loss, target cosine, its square
    head_gradient_norm: Tensor | float = math.nan

    def add(self, measured: Tensor, images: int, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self.images += images
        if outcome == APPLIED:
            self.measured.append(measured)

    @property
    def steps(self) -> int:
        return self.outcomes.total()

    def means(self) -> list[float]:
        """Over the applied steps; NaN without any."""
        return torch.stack(self.measured).mean(0).tolist() if self.measured else [math.nan] * 3

    def highest_loss(self) -> float:
        """Of the applied steps; NaN without any."""
        return float(torch.stack(self.measured)[:, 0].max()) if self.measured else math.nan

    def state(self) -> dict[str, Any]:
        return {
            "outcomes": dict(self.outcomes),
            "images": self.images,
            "measured": [measured.tolist() for measured in self.measured],
            "seconds": time.monotonic() - self.start,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Window:
        measured = [torch.tensor(values, device=device) for values in state["measured"]]
        return cls(time.monotonic() - state["seconds"], state["images"], Counter(state["outcomes"]), measured)


@dataclass
class Published:
    """How far what only grows had come at the last log line of this process."""

    bad_records: int = 0
    bytes_read: int = 0
    expectation_updates: int = 0


def step_record(run: Run, lr: float, gradient_norm: float) -> StepRecord:
    """Of ``run.window``, which ends now; the host waits for the device. Collectives: those of PartialFC.statistics."""
    window, stage, world_size = run.window, run.stages.stage, run.ranks.world_size
    seconds = time.monotonic() - window.start
    loss, target_cosine, target_cosine_square = window.means()
    timed, observation = run.timer.window(), run.head.observation
    samples = window.images // world_size
    operations = _operations(run, samples)
    before, now = run.published, Published(len(run.batches.bad_records), run.bytes_read, run.head.expectation_updates)
    run.published = now
    return StepRecord(
        step=run.step,
        target_steps=run.stages.total_steps,
        furthest_step=max(run.furthest, run.step),
        epoch=run.stages.epoch(run.step),
        stage=stage.index,
        stage_name=stage.name,
        restarts=run.restarts,
        remaining_seconds=run.stages.images_left(run.step) * seconds / window.images,
        images=window.images,
        samples=samples,
        steps=window.steps,
        outcomes={_label(outcome): window.outcomes[outcome] for outcome in OUTCOMES},
        images_per_second=window.images / seconds,
        step_seconds=timed.per_step(),
        part_seconds=timed.parts,
        step_durations=_histogram(timed.steps, STEP_SECONDS_EDGES),
        operations=operations,
        utilization=operations / seconds / run.peak_flops,
        memory=memory(run.ranks.device),
        sample_rate=stage.config.sample_rate,
        loss=loss,
        loss_maximum=window.highest_loss(),
        target_cosine=target_cosine,
        target_cosine_square=target_cosine_square,
        target_cosine_smoothed=float(run.stages.measure.value()),
        learning_rate=lr,
        gradient_norm=gradient_norm,
        head_gradient_norm=float(window.head_gradient_norm),
        loss_scale=loss_scale(run.engine),
        head_classes={"held": len(run.head.shard), "sampled": observation.sampled, "positive": int(observation.positive)},
        own_center_cosines=Histogram(observation.take_cosines(), None),
        hardest_negative_cosine=float(observation.hardest_negative),
        expectation_updates=now.expectation_updates - before.expectation_updates,
        records={"read": samples, "replaced": now.bad_records - before.bad_records},
        bad_records=now.bad_records,
        record_bytes=now.bytes_read - before.bytes_read,
        data_queue_batches=run.batches.batches_ahead,
        **_evaluation(run.verification),
        **run.head.statistics(),
        **{f"checkpoint_{name}": value for name, value in vars(run.checkpoints.report).items()},
    )


def live_values(watchdog: Watchdog, run_time: RunTime, verification: PairVerification | None) -> dict[str, Value]:
    """What a scrape reads at its moment, by metric."""
    position, reports = watchdog.position, verification.newest if verification else {}
    values: dict[str, Value] = {
        "lvface_phase": {phase: float(phase == position.phase) for phase in PHASES},
        "lvface_heartbeat_timestamp_seconds": position.at,
        "lvface_run_time_seconds_total": run_time.so_far(_USE.get(position.phase, "train")),
    }
    if reports:
        values["lvface_evaluation_step"] = verification.step
        values["lvface_evaluation_accuracy_ratio"] = {name: report.accuracy.mean for name, report in reports.items()}
        values["lvface_evaluation_true_accept_ratio"] = {
            (name, f"{at.far_target:g}"): at.tar for name, report in reports.items() for at in report.tar_at_far
        }
    return values


def _evaluation(verification: PairVerification | None) -> dict[str, Any]:
    if verification is None:
        return {}
    accuracies = {name: report.accuracy.mean for name, report in verification.newest.items()}
    return {"evaluation_step": verification.step, "evaluation_accuracy": accuracies}


def peak_flops(cfg: RunConfig, precision: str, device: torch.device) -> float:
    """Operations/s of this rank's device at best; NaN if nobody says."""
    if cfg.metrics.peak_tflops is not None:
        return cfg.metrics.peak_tflops * 1e12
    gpu = accelerator_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.flops.get(precision, math.nan) if gpu else math.nan


def memory(device: torch.device) -> dict[str, float]:
    """Bytes ``used`` now and at most (``peak``), of ``total``: of the GPU; on a CPU of this process, and in the machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return {"used": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device), "total": total}
    process, machine = _kilobytes("/proc/self/status"), _kilobytes("/proc/meminfo")
    return {"used": process["VmRSS"] * 1024, "peak": process["VmHWM"] * 1024, "total": machine["MemTotal"] * 1024}


def _operations(run: Run, samples: int) -> float:
    """Of this rank for ``samples`` of its own images."""
    model, stage = run.cfg.model, run.stages.stage
    preset, embedding_size = PRESETS[model.name], model.embedding_size
    if stage.config.freeze_backbone:  # forward alone, and no token is dropped
        of_image = backbone_forward_flops(preset, embedding_size=embedding_size)
    else:
        of_image = backbone_flops(preset, mask_ratio=model.mask_ratio, embedding_size=embedding_size)
    at_once = stage.micro_batch_size * run.ranks.world_size
    return samples * of_image + samples // stage.micro_batch_size * run.head.flops(at_once)


def _histogram(values: Sequence[float], edges: Sequence[float]) -> Histogram:
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[bisect_left(edges, value)] += 1
    return Histogram(counts, sum(values))


def _label(outcome: str) -> str:
    return outcome.removeprefix("fp16 ").replace(" ", "_")


def _kilobytes(path: str) -> Mapping[str, int]:
    """The lines ``name: number kB`` of a file of /proc."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
