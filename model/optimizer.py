"""AdamW for a shard of class centers of which a step touches only some rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor

RowGradient = tuple[Tensor | None, Tensor]
CentersOptimizerKind = Literal["row_sparse", "dense"]
_ROWS_AT_ONCE = {"cpu": 512, "cuda": 16384}  # on a CPU a block of weight, moments and gradient stays in cache; a GPU wants few launches


class CentersOptimizer(Protocol):
    """What the head needs of an optimizer of its centers."""

    def step(self, rows: Tensor | None, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        """Apply ``grad`` [S, D] float32 to the distinct local ``rows`` [S] int64 of the weight; None: every row, in order."""

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
    def step(self, rows: Tensor | None, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        beta1, beta2 = self._betas
        if rows is None:
            self._steps += 1
            steps = self._steps
        else:
            self._steps.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
            steps = self._steps[rows]
        steps = steps.double().unsqueeze(1)
        # lr / c1 * mean / (sqrt(square) / c2 + eps), with both sides of the fraction multiplied by c2: one factor and one addend a row.
        correction2 = (1.0 - beta2**steps).sqrt()
        step_size = (lr * correction2 / (1.0 - beta1**steps)).float()
        eps = (self._eps * correction2).float()
        at_once = _ROWS_AT_ONCE[grad.device.type]
        for start in range(0, grad.shape[0], at_once):
            part = slice(start, start + at_once)
            with _rows_of((self._exp_avg, self._exp_avg_sq, self._weight), rows, part) as (mean, square, weight):
                mean.lerp_(grad[part], 1.0 - beta1)
                square.mul_(beta2).addcmul_(grad[part], grad[part], value=1.0 - beta2)
                update = mean.mul(step_size[part]).div_(square.sqrt().add_(eps[part]))
                weight.mul_(1.0 - lr * weight_decay).sub_(update)

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
    def step(self, rows: Tensor | None, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        self._adamw.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        self._parameter.grad = grad if rows is None else torch.zeros_like(self._weight).index_copy_(0, rows, grad)
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
    """The optimizer named ``kind``; ValueError for another name, betas outside [0, 1) or a negative eps."""
    if not all(0.0 <= beta < 1.0 for beta in betas) or eps < 0.0:
        raise ValueError(f"betas must lie in [0, 1) and eps must not be negative, got {betas} and {eps}")
    if kind == "row_sparse":
        return RowSparseAdamW(weight, betas, eps)
    if kind == "dense":
        return DenseAdamW(weight, betas, eps)
    raise ValueError(f"optimizer must be row_sparse or dense, got {kind!r}")


def unite_rows(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(sorted distinct rows of both, place among them of each row of ``one``, then of ``other``). A GPU's host waits for their number."""
    return torch.cat([one, other]).unique(return_inverse=True)


def add_rows(total: RowGradient, more: RowGradient, united: tuple[Tensor, Tensor] | None = None) -> RowGradient:
    """Sum of two row-sparse matrices (sorted distinct rows [S] int64, or None for all; values [S, D]). May change ``total``.

    ``united``: :func:`unite_rows` of their rows, if it is known already.
    """
    if not len(total[1]) or not len(more[1]):
        return total if len(total[1]) else more
    if total[0] is None and more[0] is None:
        return None, total[1].add_(more[1])
    if total[0] is None:
        return None, total[1].index_add_(0, *more)
    if more[0] is None:
        return add_rows(more, total)
    rows, places = unite_rows(total[0], more[0]) if united is None else united
    values = total[1].new_zeros(rows.numel(), total[1].shape[1])
    for place, (_, part) in zip(places.split([total[0].numel(), more[0].numel()]), (total, more), strict=True):
        values.index_add_(0, place, part)
    return rows, values


@contextmanager
def _rows_of(tensors: Sequence[Tensor], rows: Tensor | None, part: slice) -> Iterator[list[Tensor]]:
    """Rows ``rows[part]`` of each [c, D] tensor, to be changed in place: views where rows is None, else copies that are written back."""
    if rows is None:
        yield [tensor[part] for tensor in tensors]
        return
    copies = [tensor.index_select(0, rows[part]) for tensor in tensors]
    yield copies
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.index_copy_(0, rows[part], copy)
