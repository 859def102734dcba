"""A run: everything that training needs, and what happens around the steps of the loop. train.build makes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from data_pipeline.loader import FaceLoader
from model.collectives import Collectives
from model.norm_margin import AdaFace, MagFace
from model.partial_fc import Margin, PartialFC
from train.backbone import FrozenBackbone, TrainedBackbone
from train.checkpoint import Checkpoints, Saved
from train.config import RunConfig
from train.dist import RankError, Ranks
from train.ema import BackboneEma
from train.engine import set_batch, set_learning_rate
from train.evaluation import PairVerification
from train.guard import APPLIED, Guard
from train.initial import Origin
from train.live import Progress
from train.lock import OutputLock
from train.margins import AdaFaceMargin, MagFaceMargin, MarginSection
from train.metrics import TARGETS, Metrics
from train.replicas import replicas, require_equal
from train.report import stage_line
from train.stages import Stage, StageLosses, StageManager
from train.stop import Flags, Stopped, StopRequests
from train.tensorboard import TensorBoard
from train.timing import PartTimer, RunTime
from train.watchdog import Watchdog
from train.window import Published, Window, step_record


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
    timer: PartTimer
    run_time: RunTime
    watchdog: Watchdog
    verification: PairVerification | None  # of checkpoints, where the recipe has pairs
    lock: OutputLock | None  # of the output, on rank 0
    stop: StopRequests
    flags: Flags
    progress: Progress
    tensorboard: TensorBoard | None  # on rank 0, with metrics.tensorboard
    backbone: TrainedBackbone | FrozenBackbone = field(init=False)  # the engine as the current stage uses it
    losses: StageLosses = field(default_factory=StageLosses)
    step: int = 0  # completed optimizer steps
    window: Window = field(default_factory=Window)
    published: Published = field(default_factory=Published)
    restarts: int = 0  # from checkpoints, of processes that logged a step
    furthest: int = 0  # step that any process of the run has reached, as far as it was logged
    origin: Origin | None = None  # the weights that the backbone began with; None: random ones
    peak_flops: float = math.nan  # of this rank's device
    saved_step: int | None = None  # of the newest checkpoint that this process began, or went on from
    bytes_of_stages: int = 0  # read by the loaders of stages that are over
    images_trained: int = 0  # over all ranks, without the current window
    seconds_trained: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the loop, one of train.watchdog.PHASES: timed, and under its deadline."""
        self.watchdog.enter(name, self.step)
        with self.timer.part("data_wait" if name == "data" else name):
            yield
        self.watchdog.enter("loop", self.step)  # not after an exception: what is said of it names the phase

    def enter_stage(self) -> None:
        """Set head, engine and loader to the stage of the coming step, after a resume too. Collectives: a gather, for another batch."""
        stage, config = self.stages.stage, self.stages.stage.config
        margin, curricular = head_margin(stage.margin)
        self.head.set_stage(config.sample_rate, config.centers, config.update_expectation, margin, curricular)
        self.guard.enter_stage(stage.name)
        set_batch(self.engine, stage.micro_batch_size, stage.grad_accum_steps)
        if config.freeze_backbone:
            self.backbone = FrozenBackbone(self.engine, Collectives(self.ranks.group), stage.grad_accum_steps)
        else:
            self.backbone = TrainedBackbone(self.engine, self.ema)
        if not self._reads_for(stage):
            self.bytes_of_stages += self.batches.bytes_read
            self.batches = self.ranks.together(lambda: self.open_batches(stage.index, bad_records=self.batches.bad_records))
        self.ranks.say(stage_line(stage, self.stages.start, self.stages.stop))

    def begin(self) -> None:
        """What was done so far belongs to the start of the run, not to its first step; a pass over all images is saved at once.

        Collectives: those of enter_stage, and of a save.
        """
        self.enter_stage()
        self.run_time.lap("start")
        if self.saved_step is None and self.cfg.head.init_centers == "class_means":
            with self.phase("checkpoint"):
                self.save()
        self.timer.restart()

    def begin_step(self) -> float:
        """Set and return the learning rate of the coming step; let the head observe it, if it will be logged."""
        lr = self.stages.learning_rate(self.step)
        set_learning_rate(self.engine, lr)
        self.head.observing = self._log_due(self.step + 1)
        return lr

    @property
    def bytes_read(self) -> int:
        """Of records by this rank."""
        return self.bytes_of_stages + self.batches.bytes_read

    def _reads_for(self, stage: Stage) -> bool:
        """Whether the loader's batches are those of ``stage``."""
        return (self.batches.batch_size, self.batches.global_batch_size) == (stage.micro_batch_size, stage.images_per_step)

    def stage_is_over(self) -> bool:
        """Whether the coming step begins another stage. Collectives: a broadcast, now and then, where a stage may end before its time."""
        return self.stages.finish_step(self.step, self.ranks.agree)

    def check_replicas(self) -> None:
        """Stop if the ranks' weights are not equal, in the steps that guard.replica_check_steps names; to be called before the step.

        Raises RankError. Collectives: see train.replicas.require_equal.
        """
        every = self.cfg.guard.replica_check_steps
        if every is not None and (self.step + 1) % every == 0 and self.backbone.ends_step:
            require_equal(self.step + 1, replicas(self.engine, self.head), self.ranks)

    def measure_head_gradient(self) -> None:
        """On steps that will be logged: the norm of the centers' gradient. Collectives: one all-reduce."""
        if self._log_due(self.step + 1):
            self.window.head_gradient_norm = self.head.gradient_norm()

    def record(self, measured: Tensor, lr: float, outcome: str) -> None:
        """Note the step just taken; on logging steps publish the window and print a line.

        Args:
            measured: [3] loss, target cosine and its square, means over the step's micro-batches, on the device.
            outcome: one of train.guard.OUTCOMES.
        """
        stage, loss = self.stages.stage, measured[0]
        self.timer.end_step()
        self.run_time.lap("skip" if outcome != APPLIED else "repeat" if self.step <= self.furthest else "train")
        self.window.add(measured, stage.images_per_step, outcome)
        if outcome == APPLIED:
            self.losses.record(stage.name, loss)
            self.stages.observe(measured[2])
        self.progress.step(self.step, self.stages.total_steps)
        if self._log_due(self.step):
            self._publish(lr, self.backbone.gradient_norm() if outcome == APPLIED else math.nan)

    def _log_due(self, step: int) -> bool:
        return step % self.cfg.metrics.log_every == 0 or step == self.stages.total_steps

    def _publish(self, lr: float, gradient_norm: float) -> None:
        record = step_record(self, lr, gradient_norm)
        self.images_trained += record.images
        self.seconds_trained += record.images / record.images_per_second
        self.metrics.record_step(record)
        self.progress.window(record)
        if self.tensorboard:
            self.tensorboard.record(self.step, self.metrics.collect())
        self.window = Window()
        if self.origin is None:  # of a backbone that knew faces the loss need not fall much
            self.guard.after_window(record.loss, record.epoch - self.stages.warmup_epochs)

    def evaluation_due(self) -> bool:
        if self.verification is None or (self.step == self.stages.total_steps and not self.cfg.eval.every_checkpoint):
            return False  # the last weights are evaluated once they are on the disk
        every = self.cfg.eval.every_steps
        return (every is not None and self.step % every == 0) or (self.cfg.eval.every_checkpoint and self.checkpoint_due())

    def evaluate(self) -> None:
        """Verify pairs with the present weights; without a result the run goes on. Collectives: see PairVerification.verify_engine."""
        begin = time.monotonic()
        batch_size = self.stages.stage.micro_batch_size
        problem = self.verification.verify_engine(self.step, self.engine, batch_size, lambda: self.stop.reason is not None)
        if problem:
            self.ranks.say(f"warning: the evaluation at step {self.step} has no result: {problem}")
        else:
            reports = self.verification.newest
            found = ", ".join(f"{name} {100 * report.accuracy.mean:.2f} %" for name, report in reports.items())
            self.ranks.say(f"evaluation at step {self.step}: {found} ({time.monotonic() - begin:.1f} s)")
        self.window.start += time.monotonic() - begin  # throughput is of training
        self.run_time.lap("evaluate")

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
            "origin": self.origin and asdict(self.origin),
            "window": self.window.state(),
            "trained": {"images": self.images_trained, "seconds": self.seconds_trained},
        }
        score = self.verification.score if self.verification and self.verification.step == self.step else None
        self.checkpoints.save(self.step, self.engine, self.ema, self._rank_state(), run_state, score)
        self.saved_step = self.step
        self.window.start += time.monotonic() - begin  # throughput is of training; what a save makes it wait is not counted
        self.run_time.lap("checkpoint")

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
        self.furthest = max(self.furthest, self.step)
        self.stages.load_state(saved.run_state["stages"], saved.step)
        if not self._reads_for(self.stages.stage):
            raise RankError(f"cannot roll back to {newest}: its stage had another batch, and its images begin anew; start again from it")
        self._restore(saved)
        if self.tensorboard:
            self.tensorboard.go_back(saved.step)
        self.ranks.say(f"{self.guard.rolled_back(saved.run_state['guard'])}, to {newest}; the next images follow")
        self.window = Window()
        self.enter_stage()
        self.run_time.lap("repeat")

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
        self.run_time.lap("checkpoint")

    def resume(self, saved: Saved) -> None:
        """Go on from a checkpoint. The loader was opened at its cursor already. Collectives: a gather of the low-precision weights."""
        self._restore(saved)
        self.guard.load_state(saved.run_state["guard"])
        self.published.bad_records = len(self.batches.bad_records)  # those known were told by an earlier process

    def _restore(self, saved: Saved) -> None:
        """All but the guard, which remembers why it went back."""
        saved.restore(self.engine, self.ema, self.cfg.seed, self.ranks.rank)
        self.head.load_state(saved.rank_state["head"])
        self.losses.load_state(saved.run_state["losses"])
        self.window = Window.from_state(saved.run_state["window"], self.ranks.device)
        trained = saved.run_state["trained"]
        self.step, self.images_trained, self.seconds_trained = saved.step, trained["images"], trained["seconds"]
        self.saved_step, self.checkpoints.last = saved.step, saved.folder

    def close(self) -> None:
        self.progress.close()
        if self.tensorboard:
            self.tensorboard.close()
        self.flags.close()
        self.checkpoints.close()
        self.metrics.close()
        if self.ranks.is_first:  # an end in order: nobody shall be told that the ranks are down
            (self.cfg.output / TARGETS).unlink(missing_ok=True)
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
