"""A run: everything that training needs, and what happens around the steps of the loop. train.build makes it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from data_pipeline.loader import FaceLoader
from model.partial_fc import PartialFC
from train.checkpoint import Checkpoints, Saved
from train.config import RunConfig
from train.dist import RankError, Ranks
from train.engine import loss_scale
from train.metrics import Metrics, PhaseTimer, StepRecord
from train.report import progress_line, stage_line
from train.schedule import learning_rate
from train.stages import Stage, StageLosses, StageManager

_MAX_SKIPPED_IN_A_ROW = 50  # fp16 finds its loss scale within 20


@dataclass
class _Window:
    """What happened since the last log line."""

    start: float = field(default_factory=time.monotonic)
    steps: int = 0
    skipped: int = 0
    losses: list[Tensor] = field(default_factory=list)
    head_gradient_norm: Tensor | float = math.nan

    def add(self, loss: Tensor, applied: bool) -> None:
        self.steps += 1
        self.skipped += not applied
        self.losses.append(loss)

    def mean_loss(self) -> float:
        return float(torch.stack(self.losses).mean())

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "losses": list(map(float, self.losses)),
            "seconds": time.monotonic() - self.start,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> _Window:
        losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
        return cls(time.monotonic() - state["seconds"], state["steps"], state["skipped"], losses)


@dataclass
class Run:
    """State of one training run on this rank."""

    cfg: RunConfig
    ranks: Ranks
    batches: FaceLoader
    engine: object  # deepspeed.DeepSpeedEngine
    head: PartialFC
    stages: StageManager
    warmup_steps: int
    checkpoints: Checkpoints
    metrics: Metrics
    timer: PhaseTimer
    lock: TextIO | None  # on rank 0, open as long as the run writes to its output
    losses: StageLosses = field(default_factory=StageLosses)
    step: int = 0  # completed optimizer steps
    window: _Window = field(default_factory=_Window)
    last_checkpoint: Path | None = None
    images_trained: int = 0  # over all ranks, without the current window
    seconds_trained: float = 0.0
    skipped_in_a_row: int = 0

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.step * self.cfg.batch.grad_accum_steps / self.batches.steps_per_epoch

    def learning_rate(self) -> float:
        """Of the step that is about to be taken."""
        schedule = self.cfg.schedule
        return learning_rate(
            self.step,
            base_lr=self.cfg.optimizer.lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.stages.total_steps,
            decay=schedule.decay,
            power=schedule.power,
            final_lr=schedule.final_lr,
        )

    def enter_stage(self) -> None:
        """Switch the head if the coming step begins a stage (or the process)."""
        stage = self.stages.enter(self.step, self.head)
        if stage is not None:
            self.ranks.say(stage_line(stage))

    def measure_head_gradient(self) -> None:
        """On steps that will be logged: the norm of the centers' gradient. Collectives: one all-reduce."""
        if self._log_due(self.step + 1):
            self.window.head_gradient_norm = self.head.gradient_norm()

    def record(self, losses: list[Tensor], lr: float, applied: bool) -> None:
        """Note the step just taken; on logging steps publish the window and print a line. ``losses``: one a micro-batch, on the device."""
        stage = self.stages.at(self.step - 1)
        loss = torch.stack(losses).mean()
        self.losses.record(stage.name, loss)
        self.window.add(loss, applied)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self._log_due(self.step):
            self._publish(stage, lr, float(self.engine.get_global_grad_norm()) if applied else math.nan)
        if self.skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
            raise RankError(
                f"steps {self.step - _MAX_SKIPPED_IN_A_ROW + 1} to {self.step} were all skipped: a gradient was not finite (last loss "
                f"{float(loss):g}). Start again with a lower optimizer.lr, a longer warm-up or a smaller margin"
            )

    def _log_due(self, step: int) -> bool:
        return step % self.cfg.metrics.log_every == 0 or step == self.stages.total_steps

    def _publish(self, stage: Stage, lr: float, gradient_norm: float) -> None:
        window, now = self.window, time.monotonic()
        images = window.steps * self.cfg.global_batch_size(self.ranks.world_size)
        seconds = now - window.start
        self.images_trained += images
        self.seconds_trained += seconds
        record = StepRecord(
            step=self.step,
            epoch=self.epoch,
            stage=stage.index,
            stage_name=stage.name,
            sample_rate=stage.config.sample_rate,
            loss=window.mean_loss(),
            target_cosine=float(self.head.target_cosine),
            learning_rate=lr,
            gradient_norm=gradient_norm,
            head_gradient_norm=float(window.head_gradient_norm),
            loss_scale=loss_scale(self.engine),
            images=images,
            steps=window.steps,
            skipped_steps=window.skipped,
            images_per_second=images / seconds,
            step_seconds=self.timer.window(window.steps),
            eta_seconds=(self.stages.total_steps - self.step) * seconds / window.steps,
        )
        self.metrics.record_step(record)
        self.ranks.say(progress_line(record, self.stages.total_steps))
        self.window = _Window()

    def checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return any(self.step == stage.stop for stage in self.stages.stages) or (every is not None and self.step % every == 0)

    def save(self) -> None:
        """Commit a checkpoint of this step. Collectives: see Checkpoints.save."""
        begin = time.monotonic()
        rank_state = {"head": self.head.state(), "loader": self.batches.state()}
        run_state = {
            "stage": self.stages.at(self.step - 1).name,
            "epoch": self.epoch,
            "losses": self.losses.state(),
            "window": self.window.state(),
            "trained": {"images": self.images_trained, "seconds": self.seconds_trained},
        }
        self.last_checkpoint = self.checkpoints.save(self.step, self.engine, rank_state, run_state)
        self.ranks.say(f"checkpoint {self.last_checkpoint}")
        self.window.start += time.monotonic() - begin  # throughput is of training; saving is not counted

    def resume(self, saved: Saved) -> None:
        """Go on from a checkpoint. The loader was opened at its cursor already. Collectives: DeepSpeed's load."""
        saved.restore(self.engine)
        self.head.load_state(saved.rank_state["head"])
        self.losses.load_state(saved.run_state["losses"])
        self.window = _Window.from_state(saved.run_state["window"], self.ranks.device)
        trained = saved.run_state["trained"]
        self.step, self.images_trained, self.seconds_trained = saved.step, trained["images"], trained["seconds"]
        self.last_checkpoint = saved.folder

    def close(self) -> None:
        self.metrics.close()
        if self.lock:
            self.lock.close()
