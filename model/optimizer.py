"""AdamW for a shard of class centers of which a step touches only some rows."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

CentersOptimizerKind = Literal["row_sparse", "dense"]
_ROWS_AT_ONCE = 4096  # keeps the temporaries of a step within the cache, and small beside the moments


class CentersOptimizer(Protocol):
    """What the head needs of an optimizer of its centers."""

    def step(self, rows: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        """Apply ``grad`` [S, D] float32 to the distinct local ``rows`` [S] int64 of the weight."""

    def state(self) -> dict[str, Tensor]:
        """Tensors with one row a class, for a checkpoint; not copies."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over the rows of :meth:`state`."""


class RowSparseAdamW:
    """AdamW (arXiv:1711.05101) that touches the given rows only, with a step count per row.

    A row that is not sampled keeps its weight and moments: no decay, no drift on old momentum. The bias correction of a row counts the
    steps in which it took part. With every row given at every step this is ``torch.optim.AdamW``.
    """

    def __init__(self, weight: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """``weight``: [c, D] float32, changed in place by :meth:`step`."""
        self._weight, self._betas, self._eps = weight, betas, eps
        self._exp_avg = torch.zeros_like(weight)
        self._exp_avg_sq = torch.zeros_like(weight)
        self._steps = torch.zeros(weight.shape[0], dtype=torch.int32, device=weight.device)

    @torch.no_grad()
    def step(self, rows: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        beta1, beta2 = self._betas
        self._steps[rows] += 1
        for chunk, g in zip(rows.split(_ROWS_AT_ONCE), grad.split(_ROWS_AT_ONCE), strict=True):
            steps = self._steps[chunk].double().unsqueeze(1)
            step_size = (lr / (1.0 - beta1**steps)).float()
            correction2 = (1.0 - beta2**steps).sqrt().float()
            mean = self._exp_avg[chunk].lerp_(g, 1.0 - beta1)
            square = self._exp_avg_sq[chunk].mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            self._exp_avg[chunk], self._exp_avg_sq[chunk] = mean, square
            denominator = square.sqrt_().div_(correction2).add_(self._eps)
            self._weight[chunk] = self._weight[chunk].mul_(1.0 - lr * weight_decay).sub_(mean.mul_(step_size).div_(denominator))

    def state(self) -> dict[str, Tensor]:
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "steps": self._steps}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class DenseAdamW:
    """``torch.optim.AdamW(fused=True)`` over every row: the field's behaviour, for parity with it.

    Rows that were not sampled have gradient zero: they still decay and still move with their old momentum.
    """

    def __init__(self, weight: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """``weight``: [c, D] float32, changed in place by :meth:`step`."""
        self._weight = weight
        self._parameter = torch.nn.Parameter(weight)  # shares the storage
        self._adamw = torch.optim.AdamW([self._parameter], betas=betas, eps=eps, fused=True)
        self._steps = torch.zeros((), device=weight.device)
        self._adamw.state[self._parameter] = {
            "step": self._steps,
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }

    @torch.no_grad()
    def step(self, rows: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        self._adamw.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        self._parameter.grad = torch.zeros_like(self._weight).index_copy_(0, rows, grad)
        self._adamw.step()
        self._parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        state = self._adamw.state[self._parameter]
        steps = self._steps.to(torch.int32).expand(self._weight.shape[0])
        return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "steps": steps}

    def load_state(self, state: dict[str, Tensor]) -> None:
        own = self._adamw.state[self._parameter]
        own["exp_avg"].copy_(state["exp_avg"])
        own["exp_avg_sq"].copy_(state["exp_avg_sq"])
        if state["steps"].numel():
            self._steps.copy_(state["steps"].max())


def build_centers_optimizer(kind: CentersOptimizerKind, weight: Tensor, betas: tuple[float, float], eps: float) -> CentersOptimizer:
    """The optimizer named ``kind``; ValueError for another name."""
    if kind == "row_sparse":
        return RowSparseAdamW(weight, betas, eps)
    if kind == "dense":
        return DenseAdamW(weight, betas, eps)
    raise ValueError(f"optimizer must be row_sparse or dense, got {kind!r}")


def coalesce_rows(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum row-sparse matrices: ``[(rows [S_i], values [S_i, D]), ...]`` -> (sorted distinct rows [S], summed values [S, D])."""
    if len(parts) == 1:
        return parts[0]
    rows, inverse = torch.cat([rows for rows, _ in parts]).unique(return_inverse=True)
    values = torch.cat([values for _, values in parts])
    return rows, values.new_zeros(rows.numel(), values.shape[1]).index_add_(0, inverse, values)
