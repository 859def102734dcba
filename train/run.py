"""A run: everything that training needs, and what happens around the steps of the loop. train.build makes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import FaceLoader
from model.norm_margin import AdaFace, MagFace
from model.partial_fc import Margin, PartialFC
from train.checkpoint import Checkpoints, Saved
from train.config import AdaFaceMargin, MagFaceMargin, MarginSection, RunConfig
from train.dist import RankError, Ranks
from train.ema import BackboneEma
from train.engine import loss_scale, set_batch
from train.guard import Guard
from train.lock import OutputLock
from train.metrics import Metrics, PhaseTimer, StepRecord
from train.replicas import replicas, require_equal
from train.report import progress_line, stage_line
from train.stages import Stage, StageLosses, StageManager
from train.stop import Flags, Stopped, StopRequests
from train.watchdog import Watchdog


@dataclass
class _Window:
    """What happened since the last log line."""

    start: float = field(default_factory=time.monotonic)
    steps: int = 0
    timed_steps: int = 0  # those that this process took
    skipped: int = 0
    images: int = 0
    measured: list[Tensor] = field(default_factory=list)  # of each applied step [3]: loss, target cosine, its square
    head_gradient_norm: Tensor | float = math.nan

    def add(self, measured: Tensor | None, images: int) -> None:
        """``measured``: None of a step that was skipped."""
        self.steps += 1
        self.timed_steps += 1
        self.images += images
        if measured is None:
            self.skipped += 1
        else:
            self.measured.append(measured)

    def means(self) -> list[float]:
        """Over the applied steps; NaN without any."""
        return torch.stack(self.measured).mean(0).tolist() if self.measured else [math.nan] * 3

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "images": self.images,
            "measured": [measured.tolist() for measured in self.measured],
            "seconds": time.monotonic() - self.start,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> _Window:
        measured = [torch.tensor(values, device=device) for values in state["measured"]]
        start = time.monotonic() - state["seconds"]
        return cls(start, state["steps"], skipped=state["skipped"], images=state["images"], measured=measured)


@dataclass
class Run:
    """State of one training run on this rank."""

    cfg: RunConfig
    ranks: Ranks
    batches: FaceLoader
    open_batches: Callable[..., FaceLoader]  # (stage, bad_records=those known already): from its first image on
    engine: object  # deepspeed.DeepSpeedEngine
    ema: BackboneEma | None  # the mean of the backbone's weights, with model.ema_decay
    head: PartialFC
    guard: Guard
    stages: StageManager
    checkpoints: Checkpoints
    metrics: Metrics
    timer: PhaseTimer
    watchdog: Watchdog
    lock: OutputLock | None  # of the output, on rank 0
    stop: StopRequests
    flags: Flags
    losses: StageLosses = field(default_factory=StageLosses)
    step: int = 0  # completed optimizer steps
    window: _Window = field(default_factory=_Window)
    saved_step: int | None = None  # of the newest checkpoint that this process began, or went on from
    images_trained: int = 0  # over all ranks, without the current window
    seconds_trained: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the step, one of train.metrics.PHASES: timed, and under its deadline."""
        self.watchdog.enter(name, self.step)
        with self.timer.phase(name):
            yield
        self.watchdog.enter("loop", self.step)  # not after an exception: what is said of it names the phase

    def enter_stage(self) -> None:
        """Set head, engine and loader to the stage of the coming step, after a resume too. Collectives: a gather, for another batch."""
        stage, config = self.stages.stage, self.stages.stage.config
        margin, curricular = head_margin(stage.margin)
        self.head.set_stage(config.sample_rate, config.centers, config.update_expectation, margin, curricular)
        self.guard.enter_stage(stage.name)
        set_batch(self.engine, stage.micro_batch_size, stage.grad_accum_steps)
        if not self._reads_for(stage):
            self.batches = self.ranks.together(lambda: self.open_batches(stage.index, bad_records=self.batches.bad_records))
        self.ranks.say(stage_line(stage, self.stages.start, self.stages.stop))

    def _reads_for(self, stage: Stage) -> bool:
        """Whether the loader's batches are those of ``stage``."""
        return (self.batches.batch_size, self.batches.global_batch_size) == (stage.micro_batch_size, stage.images_per_step)

    def stage_is_over(self) -> bool:
        """Whether the coming step begins another stage. Collectives: a broadcast, now and then, where a stage may end before its time."""
        return self.stages.finish_step(self.step, self.ranks.agree)

    def check_replicas(self) -> None:
        """Stop if the ranks' weights are not equal, in the steps that guard.replica_check_steps names; to be called before engine.step.

        Raises RankError. Collectives: see train.replicas.require_equal.
        """
        every = self.cfg.guard.replica_check_steps
        if every is not None and (self.step + 1) % every == 0 and self.engine.is_gradient_accumulation_boundary():
            require_equal(self.step + 1, replicas(self.engine, self.head), self.ranks)

    def measure_head_gradient(self) -> None:
        """On steps that will be logged: the norm of the centers' gradient. Collectives: one all-reduce."""
        if self._log_due(self.step + 1):
            self.window.head_gradient_norm = self.head.gradient_norm()

    def record(self, measured: Tensor, lr: float, applied: bool) -> None:
        """Note the step just taken; on logging steps publish the window and print a line.

        ``measured``: [3] loss, target cosine and its square, means over the step's micro-batches, on the device.
        """
        stage, loss = self.stages.stage, measured[0]
        self.window.add(measured if applied else None, stage.images_per_step)
        if applied:
            self.losses.record(stage.name, loss)
            self.stages.observe(measured[2])
        if self._log_due(self.step):
            self._publish(stage, lr, float(self.engine.get_global_grad_norm()) if applied else math.nan)

    def _log_due(self, step: int) -> bool:
        return step % self.cfg.metrics.log_every == 0 or step == self.stages.total_steps

    def _publish(self, stage: Stage, lr: float, gradient_norm: float) -> None:
        window, now = self.window, time.monotonic()
        images, seconds = window.images, now - window.start
        self.images_trained += images
        self.seconds_trained += seconds
        loss, target_cosine, target_cosine_square = window.means()
        record = StepRecord(
            step=self.step,
            epoch=self.stages.epoch(self.step),
            stage=stage.index,
            stage_name=stage.name,
            sample_rate=stage.config.sample_rate,
            loss=loss,
            target_cosine=target_cosine,
            target_cosine_square=target_cosine_square,
            target_cosine_smoothed=float(self.stages.measure.value()),
            learning_rate=lr,
            gradient_norm=gradient_norm,
            head_gradient_norm=float(window.head_gradient_norm),
            loss_scale=loss_scale(self.engine),
            bad_records=len(self.batches.bad_records),
            images=images,
            steps=window.steps,
            skipped_steps=window.skipped,
            images_per_second=images / seconds,
            step_seconds=self.timer.window(window.timed_steps),
            **self.head.statistics(),
            **{f"checkpoint_{name}": value for name, value in vars(self.checkpoints.report).items()},
            eta_seconds=self.stages.images_left(self.step) * seconds / images,
        )
        self.metrics.record_step(record)
        self.ranks.say(progress_line(record, self.stages.total_steps))
        self.window = _Window()
        self.guard.after_window(loss, record.epoch - self.stages.warmup_epochs)

    def checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return self.step in (self.stages.start, self.stages.total_steps) or (every is not None and self.step % every == 0)

    def save(self) -> None:
        """Begin a checkpoint of this step. Collectives: see Checkpoints.save."""
        begin = time.monotonic()
        run_state = {
            "stage": self.stages.stage.name,
            "stages": self.stages.state(),
            "epoch": self.stages.epoch(self.step),
            "guard": self.guard.state(),
            "losses": self.losses.state(),
            "window": self.window.state(),
            "trained": {"images": self.images_trained, "seconds": self.seconds_trained},
        }
        self.checkpoints.save(self.step, self.engine, self.ema, self._rank_state(), run_state)
        self.saved_step = self.step
        self.window.start += time.monotonic() - begin  # throughput is of training; what a save makes it wait is not counted

    def _rank_state(self) -> dict[str, Any]:
        return {"head": self.head.state(), "num_classes": self.head.num_classes, "loader": self.batches.state()}

    def require_space(self) -> None:
        """See Checkpoints.require_space: before the first step, not hours later."""
        self.checkpoints.require_space(self.engine, self.ema, self._rank_state())

    def roll_back(self, before: int) -> None:
        """Go back to the newest checkpoint of fewer steps than ``before``, and on with the images that come now.

        Raises: RankError on every rank if there is none, or the stage was one of another batch then. Collectives: those of resume.
        """
        self.checkpoints.finish()
        newest = self.checkpoints.newest(before)
        if newest is None:
            raise RankError(f"no checkpoint from before step {before} to roll back to; set checkpoint.every_steps")
        saved = self.ranks.together(lambda: self.checkpoints.read(newest))
        self.stages.load_state(saved.run_state["stages"], saved.step)
        if not self._reads_for(self.stages.stage):
            raise RankError(f"cannot roll back to {newest}: its stage had another batch, and its images begin anew; start again from it")
        self._restore(saved)
        self.ranks.say(f"{self.guard.rolled_back(saved.run_state['guard'])}, to {newest}; the next images follow")
        self.window = _Window()
        self.enter_stage()

    def heed(self) -> None:
        """Between two steps: end the run, if any rank has been asked to stop or could not write what it should.

        Raises: Stopped, with a checkpoint of this step; RankError. On every rank at the same step, the one after the cause.
        Collectives: those of Flags.exchange; at the end a save, those of require_written and a gather.
        """
        stop, failed = self.flags.exchange(self.stop.reason is not None, self.checkpoints.failed or self.metrics.problem is not None)
        if not (stop or failed):
            return
        with self.phase("checkpoint"):
            if stop and not failed and self.saved_step != self.step:
                self.save()
            self.require_written()
        if stop:
            reasons = self.ranks.gather(self.stop.reason)
            why = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
            raise Stopped(f"stopped at step {self.step} ({why}); its checkpoint is complete, start again to go on from it")

    def require_written(self) -> None:
        """Wait for the checkpoint that was begun. Raises RankError on every rank if it, or a log line, could not be written.

        Collectives: three gathers at most.
        """
        self.checkpoints.finish()
        self.ranks.together(self.metrics.require_written)

    def resume(self, saved: Saved) -> None:
        """Go on from a checkpoint. The loader was opened at its cursor already. Collectives: a gather of the low-precision weights."""
        self._restore(saved)
        self.guard.load_state(saved.run_state["guard"])

    def _restore(self, saved: Saved) -> None:
        """All but the guard, which remembers why it went back."""
        saved.restore(self.engine, self.ema, self.cfg.seed, self.ranks.rank)
        self.head.load_state(saved.rank_state["head"])
        self.losses.load_state(saved.run_state["losses"])
        self.window = _Window.from_state(saved.run_state["window"], self.ranks.device)
        trained = saved.run_state["trained"]
        self.step, self.images_trained, self.seconds_trained = saved.step, trained["images"], trained["seconds"]
        self.saved_step, self.checkpoints.last = saved.step, saved.folder

    def close(self) -> None:
        self.flags.close()
        self.checkpoints.close()
        self.metrics.close()
        if self.lock:
            self.lock.close()


def head_margin(margin: MarginSection) -> tuple[Margin, bool]:
    """A recipe's margin as the head's, and whether it is CurricularFace's."""
    values = margin.model_dump(exclude={"kind"})
    if isinstance(margin, AdaFaceMargin):
        return AdaFace(**values), False
    if isinstance(margin, MagFaceMargin):
        return MagFace(**values), False
    return (margin.m1, margin.m2, margin.m3), margin.curricular
