"""What the head keeps of the micro-batches of one optimizer step, and what it knows of the coming one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.norm_margin import NormStatistics
from model.optimizer import RowGradient, add_rows


@dataclass(frozen=True)
class Moving:
    """Running values that move with every micro-batch, before its loss, and are kept if the step is applied."""

    t: Tensor  # of CurricularFace
    norms: NormStatistics  # of AdaFace

    def state(self) -> dict[str, Tensor]:
        return {"curricular_t": self.t, "norm_mean": self.norms.mean, "norm_std": self.norms.std}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], device: torch.device) -> Moving:
        t, mean, std = (state[name].to(device, copy=True) for name in ("curricular_t", "norm_mean", "norm_std"))
        return cls(t, NormStatistics(mean, std))


@dataclass(frozen=True)
class Prepared:
    labels: Tensor
    version: int  # of its content
    choice: Choice

    def is_of(self, labels: Tensor) -> bool:
        return labels is self.labels and labels._version == self.version


@dataclass(frozen=True)
class Choice:
    """Which of this rank's classes a micro-batch meets."""

    targets: Tensor  # [B] int64 local row of each sample's class, -1 where another rank owns it
    rows: Tensor | None  # [S] int64 sorted local rows that are scored; None: all
    with_expectation: Tensor | None  # those of them that have an expectation; None: all
    owned: Tensor | None  # [n] int64 samples whose class this rank owns; None where the expectations do not move
    union: Union | None  # of the rows with those of earlier micro-batches of the step, if both are named


@dataclass(frozen=True)
class Union:
    """``unite_rows`` of ``pending`` and a micro-batch's rows; made while the choice reads the device anyway."""

    pending: Tensor
    united: tuple[Tensor, Tensor]


@dataclass
class Pending:
    """What the micro-batches since the last step leave for :meth:`PartialFC.step`."""

    gradient: RowGradient | None = None  # sum over micro-batches
    micro_batches: int = 0
    targets: list[Tensor] = field(default_factory=list)  # [n] int64 local rows of the samples that this rank owns, one a micro-batch
    samples: list[Tensor] = field(default_factory=list)  # [n, D] float32 their unit embeddings
    bias: Tensor | None = None  # [1, 1] float32 gradient of UniFace's bias, sum over micro-batches
    moving: Moving | None = None  # after the last of them

    not_finite: Tensor | None = None  # [3] bool, of this rank: embeddings or class centers, their gradients, the centers' gradient

    def note_not_finite(self, found: Tensor) -> None:
        self.not_finite = found if self.not_finite is None else self.not_finite | found

    def add(self, gradient: RowGradient, union: Union | None) -> None:
        """``union`` is of no use if other micro-batches came between."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            known = union is not None and union.pending is self.gradient[0]
            self.gradient = add_rows(self.gradient, gradient, union.united if known else None)
        self.micro_batches += 1

    def mean_gradient(self, weight: Tensor) -> RowGradient:
        """Of no rows if there is none. ``weight``: what it is the gradient of."""
        if self.gradient is None:
            return no_gradient(weight)
        rows, total = self.gradient
        return rows, total if self.micro_batches == 1 else total / self.micro_batches

    def mean_bias_gradient(self) -> Tensor:
        return self.bias / self.micro_batches


def no_gradient(weight: Tensor) -> RowGradient:
    return torch.empty(0, dtype=torch.int64, device=weight.device), weight.new_empty(0, weight.shape[1])
