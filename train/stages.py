"""The stage manager: which stage a step belongs to, when it ends, its learning rate, and what the loss did in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.config import ConfigError, RunConfig, ScheduleConfig, StageConfig, UntilConfig
from train.margins import MarginSection
from train.schedule import Curve, build_curve


@dataclass(frozen=True)
class Stage:
    """One stage as planned, every default of the run filled in."""

    index: int
    config: StageConfig
    margin: MarginSection
    micro_batch_size: int
    grad_accum_steps: int
    images_per_step: int  # the global batch
    steps_per_epoch: int  # optimizer steps
    steps: int  # optimizer steps that it takes if no stage ends before its time

    @property
    def name(self) -> str:
        return self.config.name


def plan_stages(cfg: RunConfig, num_images: int, world_size: int) -> tuple[list[Stage], Curve | None]:
    """The stages in optimizer steps, now that data and ranks are known, and the learning rate of those without their own (None: all have).

    An epoch is ``num_images // global_batch_size`` optimizer steps, whatever the number of ranks.

    Raises: ConfigError if a global batch cannot be shared, the data do not fill one, a warm-up is longer than its curve, or
        a threshold would never be looked at.
    """
    stages = []
    for index, config in enumerate(cfg.stages):
        batch, key = cfg.stage_batch(index), f"stages.{index}.batch" if config.batch else "batch"
        accumulation, images = batch.accumulation(world_size, key), batch.images_per_step(world_size)
        per_epoch = num_images // images
        if not per_epoch:
            raise ConfigError(
                f"stages.{index}: {num_images} images do not fill one global batch of {images} ({batch.micro_batch_size} x {accumulation} "
                f"on each of {world_size} ranks); use a smaller {key}.micro_batch_size or accumulation"
            )
        steps = config.steps if config.steps is not None else config.epochs * per_epoch
        if config.until and config.until.check_every >= steps:
            raise ConfigError(f"stages.{index}.until.check_every: {config.until.check_every} steps, but the stage ends after {steps}")
        margin = cfg.stage_margin(index)
        stages.append(Stage(index, config, margin, batch.micro_batch_size, accumulation, images, per_epoch, steps))
    for stage in stages:
        _own_curve(stage, stage.steps)
    sharing = [stage for stage in stages if stage.config.schedule is None]
    if not sharing:
        return stages, None
    length = sum(stage.steps * stage.images_per_step for stage in sharing)
    return stages, _curve("schedule", cfg.schedule, cfg.optimizer.lr, sharing[0], length)


def _curve(key: str, config: ScheduleConfig, lr: float, first: Stage, length: int) -> Curve:
    """``first``: the stage in which it warms up; ``length``: in images. Raises: ConfigError, see plan_stages."""
    try:
        return build_curve(config, lr, batch=first.images_per_step, steps_per_epoch=first.steps_per_epoch, length=length)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _own_curve(stage: Stage, steps: int) -> Curve | None:
    """The curve of a stage that has one, when the stage takes ``steps`` steps."""
    config = stage.config.schedule
    if config is None:
        return None
    return _curve(f"stages.{stage.index}.schedule", config, config.lr, stage, steps * stage.images_per_step)


class StageManager:
    """Walks a run through its stages: a small state machine, told of every step.

    A stage ends at its planned length, or before if its ``until`` is met. What is left of it then goes to the next stage, image by image:
    the run as a whole is as long as planned, and so is its learning rate, which counts images. (Of two stages with curves of their own the
    second's becomes longer.) Every rank switches at the same step: lengths are the same everywhere, and the measure is agreed upon.
    """

    def __init__(self, stages: Sequence[Stage], curve: Curve | None) -> None:
        """``curve``: the learning rate of the stages without their own; None if there are none."""
        self._stages, self._shared_curve = tuple(stages), curve
        self._index = self._start = 0
        self._inherited = 0  # images that stages which ended before their time left to the current one
        self._epochs_before = 0.0
        self._images_before = 0  # on the shared curve
        self._begin()
        self.warmup_epochs = self._curve.warmup / (self.stage.images_per_step * self.stage.steps_per_epoch)  # the run's first warm-up

    def _begin(self) -> None:
        """What the current stage starts with."""
        self._curve = _own_curve(self.stage, self.stop - self._start) or self._shared_curve
        self.measure = SmoothedMean(self.stage.config.until)

    @property
    def stage(self) -> Stage:
        """The stage of the coming step (the last one, once the run is over)."""
        return self._stages[self._index]

    @property
    def start(self) -> int:
        """Optimizer steps before the current stage."""
        return self._start

    @property
    def stop(self) -> int:
        """Optimizer steps when the current stage is over, unless it ends before its time."""
        return self._start + self.stage.steps + self._inherited // self.stage.images_per_step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, as far as is known now."""
        return self.stop + sum(stage.steps for stage in self._stages[self._index + 1 :])

    def images_left(self, step: int) -> int:
        """Images between ``step`` steps taken and the end of the run."""
        later = sum(stage.steps * stage.images_per_step for stage in self._stages[self._index + 1 :])
        return (self.stop - step) * self.stage.images_per_step + later

    def epoch(self, step: int) -> float:
        """Passes over the training images after ``step`` steps."""
        return self._epochs_before + (step - self._start) / self.stage.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Of the step that comes after ``step`` steps."""
        batch = self.stage.images_per_step
        before = self._images_before if self.stage.config.schedule is None else 0
        return self._curve.at(before + (step - self._start) * batch, batch)

    def observe(self, target_cosine_square: Tensor) -> None:
        """Take the mean over the global batch of an applied step, scalar on the device, into the measure, if the stage has one."""
        if self.stage.config.until:
            self.measure.add(target_cosine_square)

    def finish_step(self, step: int, agree: Callable[[Tensor], float]) -> bool:
        """Take note of a step; returns whether a new stage begins with the coming one.

        Args:
            step: steps taken so far, this one included.
            agree: rank 0's value of a scalar on the device, on every rank. Called every ``check_every`` steps of a stage with ``until``.
        """
        until, over = self.stage.config.until, step >= self.stop
        if until and not over and (step - self._start) % until.check_every == 0:
            over = agree(self.measure.value()) >= until.target_cosine_square
        if over and self._index + 1 < len(self._stages):
            self._switch(step)
            return True
        return False

    def _switch(self, step: int) -> None:
        ended, taken = self.stage, step - self._start
        self._inherited = (self.stop - step) * ended.images_per_step
        self._epochs_before = self.epoch(step)
        if ended.config.schedule is None:
            self._images_before += taken * ended.images_per_step
        self._index += 1
        self._start = step
        self._begin()

    def state(self) -> dict[str, Any]:
        """JSON values; reads the measure from the device."""
        shared = self._shared_curve
        return {
            "index": self._index,
            "start": self._start,
            "inherited": self._inherited,
            "epochs_before": self._epochs_before,
            "images_before": self._images_before,
            "curve": None if shared is None else [shared.warmup, shared.length],
            "measure": self.measure.state(),
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on from :meth:`state` after ``step`` steps, also where that was the end of a run that had no further stage.

        Raises: ConfigError if what was trained already had another learning rate than these stages give it.
        """
        self._index, self._start, self._inherited = state["index"], state["start"], state["inherited"]
        self._epochs_before, self._images_before = state["epochs_before"], state["images_before"]
        on_shared = self._images_before > 0 or (step > self._start and self.stage.config.schedule is None)
        shared = self._shared_curve
        mine = None if shared is None else [shared.warmup, shared.length]
        if on_shared and state["curve"] != mine:
            raise ConfigError(
                f"stages: their learning-rate curve has warm-up and length of {mine} images, the checkpoint's {state['curve']}, and it has "
                "begun: give other stages the same length, or a schedule of their own"
            )
        self._begin()
        self.measure.load_state(state["measure"])
        if step >= self.stop and self._index + 1 < len(self._stages):
            self._switch(step)


class SmoothedMean:
    """Exponential mean that starts with its first value: ``sum_k b^(n-k) x_k / sum_k b^(n-k)``. It stays on the device until asked for."""

    def __init__(self, until: UntilConfig | None) -> None:
        """``until``: of the stage; without one nothing is ever added."""
        self._smoothing = until.smoothing if until else 0.0
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the values and of their weights; where the values are

    def add(self, value: Tensor) -> None:
        """One that is not finite (no class of a batch had an expectation yet) changes nothing."""
        share = 1.0 - self._smoothing
        moved = torch.stack([value.double() * share, torch.full_like(value, share, dtype=torch.float64)])
        moved += self._smoothing * self._sums.to(value.device)
        self._sums = torch.where(value.isfinite(), moved, self._sums.to(value.device))

    def value(self) -> Tensor:
        """Scalar float64; NaN before the first value."""
        return self._sums[0] / self._sums[1]

    def state(self) -> list[float]:
        return self._sums.tolist()

    def load_state(self, state: list[float]) -> None:
        self._sums = torch.tensor(state, dtype=torch.float64)


@dataclass
class StageLosses:
    """The loss where each stage starts and ends: means over its first and last ``window`` steps, in a short stage over its halves.

    Losses stay on the device until asked for.
    """

    window: int = 10
    count: dict[str, int] = field(default_factory=dict)  # steps of each stage so far
    first: dict[str, list[Tensor]] = field(default_factory=dict)
    last: dict[str, list[Tensor]] = field(default_factory=dict)

    def record(self, stage: str, loss: Tensor) -> None:
        self.count[stage] = self.count.get(stage, 0) + 1
        first, last = self.first.setdefault(stage, []), self.last.setdefault(stage, [])
        if len(first) < self.window:
            first.append(loss)
        last.append(loss)
        del last[: -self.window]

    def summary(self) -> dict[str, tuple[float, float]]:
        """(loss at the start, loss at the end) of every stage that has begun."""
        steps = {stage: min(self.window, max(1, count // 2)) for stage, count in self.count.items()}
        return {stage: (_mean(self.first[stage][:n]), _mean(self.last[stage][-n:])) for stage, n in steps.items()}

    def state(self) -> dict[str, Any]:
        """JSON values."""
        as_floats = {name: {stage: list(map(float, losses)) for stage, losses in getattr(self, name).items()} for name in ("first", "last")}
        return {"count": dict(self.count), **as_floats}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = dict(state["count"])
        for name in ("first", "last"):
            setattr(self, name, {stage: [torch.tensor(loss) for loss in losses] for stage, losses in state[name].items()})


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack([loss.cpu() for loss in losses]).mean())
