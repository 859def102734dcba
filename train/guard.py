"""What a run does about steps that go wrong: skips those whose loss jumps, names the records of skipped steps, and stops in time.

A step whose gradient is not finite is skipped on every rank by DeepSpeed and by the head (train.loop). The guard says why, on which rank
and with which records, and adds a second reason: a spike, a loss above ``guard.spike_factor`` times its running mean.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.output import write_file
from train.config import GuardConfig
from train.dist import RankError, Ranks
from train.metrics import finite_or_null

FILE_NAME = "skipped_steps.jsonl"
APPLIED, SPIKE, LOSS, GRADIENT, OVERFLOW = "applied", "spike", "loss not finite", "gradient not finite", "fp16 overflow"
OUTCOMES = (APPLIED, SPIKE, LOSS, GRADIENT, OVERFLOW)  # of a step
DIVERGENCE = (
    "An ArcFace margin (m2) from the first step on is known to stall the training of a ViT, or to break it. The usual cures: begin with a "
    "stage of CosFace (margin: {m3: 0.2} to {m3: 0.4}) or of a smaller margin, and raise it in the next stage; a lower optimizer.lr; a "
    "longer schedule.warmup_epochs; bf16 in place of fp16. Each of these is another run, with an output of its own."
)
_PAST = 0.98  # its weight in the running mean, per applied step
_SETTLING_STEPS = 20  # applied steps of a stage before a loss can be a spike
_STALLED = 0.95  # of the loss of the run's first window


@dataclass(frozen=True)
class Skip:
    """A skipped step."""

    step: int  # 1 is the run's first
    stage: str
    reason: str  # SPIKE, LOSS, GRADIENT or OVERFLOW
    loss: float  # mean over the micro-batches that are to blame: those that spiked, or were not finite; else all of the step
    running_mean: float | None  # None before the first applied step of the stage
    ranks: list[int]  # whose own embeddings or gradients were not finite

    @property
    def is_routine(self) -> bool:
        """The loss scale of fp16 is being found: nothing is wrong with the data."""
        return self.reason == OVERFLOW


@dataclass(frozen=True)
class _MicroBatch:
    loss: Tensor  # scalar
    spiked: Tensor  # scalar bool
    records: Callable[[], list[str]]


class Guard:
    """Watches the losses of a run, one per run and rank. Decisions are equal on all ranks, because the losses are.

    The running mean is exponential over the applied steps of a stage (weight of the past 0.98), and starts with the first one's loss. That
    loss is the highest as a rule and still weighs 2/3 after the 20 steps in which nothing is a spike: the limit is generous while the loss
    falls, and tight some 100 steps later. It begins anew with every stage, because another margin, anchor or sample_rate is another loss.

    A spike multiplies its micro-batch's loss so that the gradient is NaN on every rank; DeepSpeed and the head then skip the step, in which
    BatchNorm's running statistics alone have moved. Under fp16 DeepSpeed takes this for an overflow and lowers the loss scale as well.

    Nothing waits for the device but the handling of a skipped step.
    """

    def __init__(self, config: GuardConfig, ranks: Ranks, output: Path, precision: str) -> None:
        """
        Args:
            output: an existing folder; rank 0 appends a line to its ``skipped_steps.jsonl`` for every skipped step but fp16's overflows.
            precision: DeepSpeed's, ``fp32``, ``bf16`` or ``fp16``.
        """
        self._config, self._ranks, self._precision = config, ranks, precision
        self._file = output / FILE_NAME
        self._micro_batches: list[_MicroBatch] = []  # since the last step
        self._stage = ""
        self._applied = 0  # steps of the stage
        self._mean: Tensor | None = None  # float32 scalar: the running mean of the loss
        self._skips: list[Skip] = []  # in a row, up to now
        self._rollbacks = 0
        self._first_window: float | None = None  # loss
        self._stall_judged = False

    def enter_stage(self, name: str) -> None:
        """Of the coming step. Again with the same name, as after a resume, it does nothing."""
        if name != self._stage:
            self._stage, self._applied, self._mean = name, 0, None

    def watch(self, loss: Tensor, records: Callable[[], list[str]]) -> Tensor:
        """The loss to go backward from: ``loss``, or NaN with NaN gradients if it is a spike.

        Args:
            loss: scalar float32, equal on all ranks, of a micro-batch.
            records: names this rank's records of it; called only if the step is skipped.
        """
        guarded = self._config.spike_factor is not None and self._applied >= _SETTLING_STEPS
        spiked = loss.detach() > (self._config.spike_factor * self._mean if guarded else math.inf)
        self._micro_batches.append(_MicroBatch(loss.detach(), spiked, records))
        return loss * torch.where(spiked, math.nan, 1.0)

    def after_step(self, step: int, loss: Tensor, applied: bool, not_finite_ranks: Callable[[], list[int]]) -> str:
        """Take note of an optimizer step; afterwards :attr:`rollback_before` says whether to go back. Returns its outcome (OUTCOMES).

        Args:
            step: steps taken so far, this one included.
            loss: scalar float32, the mean over its micro-batches.
            applied: whether the engine applied it.
            not_finite_ranks: ranks whose own embeddings or gradients were not finite in these micro-batches, equal on all ranks. Called on
                all of them, if the step was skipped.

        Raises:
            RankError: guard.max_skipped steps in a row were skipped, and the recipe or an overflow of fp16 (whose cause the checkpoint
                would share) says stop; or a record's name or the file could not be had. On every rank.

        Collectives: after a skipped step those of ``not_finite_ranks`` and, unless fp16 overflowed, three gathers.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if applied:
            self._mean = loss if self._mean is None else torch.lerp(self._mean, loss, 1 - _PAST)
            self._applied += 1
            self._skips = []
            return APPLIED
        losses = torch.stack([micro.loss for micro in micro_batches]).tolist()
        spiked = torch.stack([micro.spiked for micro in micro_batches]).tolist()
        ranks = not_finite_ranks()
        reason, to_blame = diagnose(losses, spiked, ranks, self._precision)
        mean = None if self._mean is None else float(self._mean)
        skip = Skip(step, self._stage, reason, sum(losses[i] for i in to_blame) / len(to_blame), mean, ranks)
        self._skips.append(skip)
        if not skip.is_routine:
            self._report(skip, [micro_batches[i].records for i in to_blame])
        if len(self._skips) >= self._config.max_skipped and not self.rollback_before:
            used_up = f"{self._rollbacks} rollbacks have not helped. " if self._rollbacks else ""
            raise RankError(used_up + stop_text(self._skips, self._file))
        return skip.reason

    @property
    def rollback_before(self) -> int | None:
        """The step to go back beyond, the first of those that were skipped in a row; None as long as the run may go on."""
        rolls = self._config.then == "rollback" and self._rollbacks < self._config.max_rollbacks
        if not rolls or len(self._skips) < self._config.max_skipped or all(skip.is_routine for skip in self._skips):
            return None
        return self._skips[0].step

    def rolled_back(self, state: dict[str, Any]) -> str:
        """Go on from a :meth:`state` of before the skipped steps; returns what to tell."""
        rollbacks, skips = self._rollbacks + 1, self._skips
        self.load_state({**state, "rollbacks": rollbacks})
        first, last = skips[0], skips[-1]
        return f"steps {first.step} to {last.step} were all skipped ({last.reason}): rollback {rollbacks} of {self._config.max_rollbacks}"

    def after_window(self, loss: float, epochs_after_warmup: float) -> None:
        """Say once that the loss has not moved: in the first log window that ends an epoch after the warm-up or later.

        Args:
            loss: mean over the steps of the window.
            epochs_after_warmup: passes over the data between the end of the run's first warm-up and now; negative before.
        """
        if self._first_window is None:
            self._first_window = loss if math.isfinite(loss) else None
        elif epochs_after_warmup >= 1 and not self._stall_judged and math.isfinite(loss):
            self._stall_judged = True
            if has_stalled(self._first_window, loss):
                first = f"{self._first_window:.4f} at the start"
                self._ranks.say(
                    f"the loss has stalled: {first}, {loss:.4f} {epochs_after_warmup:.1f} epochs after the warm-up. {DIVERGENCE}"
                )

    def state(self) -> dict[str, Any]:
        """JSON values; reads the running mean from the device, exactly."""
        return {
            "stage": self._stage,
            "applied": self._applied,
            "mean": None if self._mean is None else float(self._mean),
            "skips": [asdict(skip) for skip in self._skips],
            "rollbacks": self._rollbacks,
            "first_window": self._first_window,
            "stall_judged": self._stall_judged,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._stage, self._applied = state["stage"], state["applied"]
        self._mean = None if state["mean"] is None else torch.tensor(state["mean"], dtype=torch.float32, device=self._ranks.device)
        self._skips, self._rollbacks = [Skip(**skip) for skip in state["skips"]], state["rollbacks"]
        self._first_window, self._stall_judged = state["first_window"], state["stall_judged"]

    def _report(self, skip: Skip, records: Sequence[Callable[[], list[str]]]) -> None:
        """A line in the file, one in the log. If ranks are to blame, only their records are named, else everyone's."""
        named = skip.ranks or range(self._ranks.world_size)
        mine = self._ranks.together(lambda: [name for ask in records for name in ask()] if self._ranks.rank in named else [])
        everyones = self._ranks.gather(mine)
        line = {**asdict(skip), "records": {rank: everyones[rank] for rank in named}}
        text = json.dumps(finite_or_null(line), allow_nan=False) + "\n"
        self._ranks.together(lambda: write_file(self._file, text, append=True) if self._ranks.is_first else None)
        self._ranks.say(skip_text(skip, self._file))


def diagnose(losses: Sequence[float], spiked: Sequence[bool], not_finite_ranks: Sequence[int], precision: str) -> tuple[str, list[int]]:
    """Why a step was skipped, and which of its micro-batches are to blame (their positions; all, if only the gradient was not finite)."""
    not_finite = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if not_finite:
        return LOSS, not_finite
    if any(spiked):
        return SPIKE, [i for i, high in enumerate(spiked) if high]
    overflow = precision == "fp16" and not not_finite_ranks
    return OVERFLOW if overflow else GRADIENT, list(range(len(losses)))


def has_stalled(first_loss: float, loss: float) -> bool:
    """Whether the loss is still above 0.95 of what it was in the run's first log window."""
    return loss > _STALLED * first_loss


def skip_text(skip: Skip, file: Path) -> str:
    """One line for the log."""
    whose = {0: "the records of all ranks", 1: "its records"}.get(len(skip.ranks), "their records")
    mean = "" if skip.running_mean is None else f", running mean {skip.running_mean:g}"
    return f"step {skip.step} skipped on all ranks: {skip.reason}{_on(skip.ranks)} (loss {skip.loss:g}{mean}); {whose} are in {file}"


def stop_text(skips: Sequence[Skip], file: Path) -> str:
    """Why a run stops after ``skips``, which were in a row."""
    reasons = ", ".join(f"{reason} ({count} x)" for reason, count in Counter(skip.reason for skip in skips).items())
    ranks = sorted({rank for skip in skips for rank in skip.ranks})
    first, last = skips[0], skips[-1]
    parts = [f"steps {first.step} to {last.step} were all skipped: {reasons}{_on(ranks)}; the last loss is {last.loss:g}"]
    if not all(skip.is_routine for skip in skips):
        parts.append(f"The records are in {file}")
    if any(skip.reason == SPIKE for skip in skips):
        parts.append("A loss that stays above the limit is no spike: raise guard.spike_factor, or set it to null")
    return ". ".join([*parts, DIVERGENCE])


def _on(ranks: Sequence[int]) -> str:
    return f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else ""
