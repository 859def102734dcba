"""The stage manager: which stage a step belongs to, what it toggles in the head, and what the loss did in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.partial_fc import PartialFC
from train.config import ConfigError, StageConfig


@dataclass(frozen=True)
class Stage:
    """One stage with its place in the run, in optimizer steps ``[start, stop)``."""

    index: int
    config: StageConfig
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.config.name


class StageManager:
    """Walks a run through its stages. Stage boundaries are a function of the recipe and the data, so every rank switches at the same step.

    A stage of E epochs takes ``E * micro_batches_per_epoch // grad_accum_steps`` optimizer steps.
    """

    def __init__(self, stages: Sequence[StageConfig], micro_batches_per_epoch: int, grad_accum_steps: int) -> None:
        """Raises ConfigError if a stage is shorter than one optimizer step."""
        self.stages: list[Stage] = []
        start = 0
        for index, config in enumerate(stages):
            steps = config.steps if config.steps is not None else config.epochs * micro_batches_per_epoch // grad_accum_steps
            if steps < 1:
                raise ConfigError(
                    f"stages.{index}.epochs: {config.epochs} epochs of {micro_batches_per_epoch} micro-batches per rank do not fill one "
                    f"step of batch.grad_accum_steps = {grad_accum_steps}"
                )
            self.stages.append(Stage(index, config, start, start + steps))
            start += steps
        self._current: Stage | None = None

    @property
    def total_steps(self) -> int:
        return self.stages[-1].stop

    def at(self, step: int) -> Stage:
        """The stage of optimizer step ``step`` (from 0)."""
        return next(stage for stage in self.stages if step < stage.stop)

    def enter(self, step: int, head: PartialFC) -> Stage | None:
        """Set the head to the stage of ``step``; returns that stage if it was not the current one, also on the first call."""
        stage = self.at(step)
        if stage is self._current:
            return None
        head.set_stage(stage.config.sample_rate, stage.config.centers, stage.config.update_expectation)
        self._current = stage
        return stage


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
