"""Anchors: the sets of unit rows that samples are scored against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from model.kernels.products import Products

AnchorName = Literal["expectation", "learned"]
_BLOCK_ROWS = 1024  # of a normalisation's backward: temporaries stay small and in cache


@dataclass(frozen=True)
class Anchor:
    """Directions that samples are scored against. These here are unit rows already and get no gradient: the expectations."""

    table: Tensor  # [c, D] float32: this rank's rows
    rows: Tensor | None  # [S] int64 sorted rows of the table that are scored; None: all
    columns: Tensor  # [B] int64 place of each sample's own class among them, -1 where this rank does not hold it
    products: Products

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.table if self.rows is None else self.rows)

    @cached_property
    def operand(self) -> Tensor:
        """[S, D] unit rows, as an operand of products."""
        return self.products.operand(self._scored(self.table))

    def unit(self, index: slice | Tensor) -> Tensor:
        """[n, D] float32 unit rows of the scored places ``index``."""
        if self.products.exact:
            return self.operand[index]
        return self._unit(index)

    def own_rows(self, samples: slice) -> Tensor:
        """[n, D] float32: the unit row of the own class of each of the ``samples``, 0 where this rank does not hold it."""
        columns = self.columns[samples]
        if not self.num_rows:
            return self.table.new_zeros(len(columns), self.table.shape[1])
        return self.unit(columns.clamp(min=0)).masked_fill_((columns < 0).unsqueeze(1), 0.0)

    def _unit(self, index: slice | Tensor) -> Tensor:
        return self._scored(self.table, index)

    def _scored(self, table: Tensor, index: slice | Tensor | None = None) -> Tensor:
        """``table`` at the scored rows, at ``index`` among them; not a copy where that is all of it."""
        if index is None:
            return table if self.rows is None else table.index_select(0, self.rows)
        return table[index] if self.rows is None else table[self.rows[index]]


class LearnedAnchor(Anchor):
    """Rows of any length, which are normalised here and get a gradient: the class centers."""

    @property
    def operand(self) -> Tensor:
        return self._operand_and_norm[0]

    @property
    def norm(self) -> Tensor:
        """[S, 1] float32, at least 1e-12."""
        return self._operand_and_norm[1]

    @cached_property
    def _operand_and_norm(self) -> tuple[Tensor, Tensor]:
        rows = self._scored(self.table)
        norm = _norm(rows)
        unit = rows / norm if rows is self.table else rows.div_(norm)  # a selection is a copy already
        return self.products.operand(unit), norm

    def backward_(self, grad: Tensor) -> Tensor:
        """Turn the gradient of the unit rows [S, D] into that of the table's rows, in place."""
        return normalize_backward_(grad, self.unit, self.norm)

    def _unit(self, index: slice | Tensor) -> Tensor:
        return self._direction(index)

    def _direction(self, index: slice | Tensor) -> Tensor:
        """The normalised row of the table itself."""
        return self._scored(self.table, index) / self.norm[index]


@dataclass(frozen=True)
class InjectedAnchor(LearnedAnchor):
    """Class centers drawn towards a remembered embedding: ``norm((1 - g) norm(w_j) + g M_j)`` (VPL, CVPR 2021). No gradient reaches M."""

    memory: Tensor  # [c, D] float32 unit rows
    share: Tensor  # [c] float32: g of each row of the table

    @property
    def operand(self) -> Tensor:
        return self._mixed_operand_and_norm[0]

    @cached_property
    def norm(self) -> Tensor:
        return _norm(self._scored(self.table))

    @cached_property
    def _mixed_operand_and_norm(self) -> tuple[Tensor, Tensor]:
        mixed = self._mixed(slice(None))
        norm = _norm(mixed)
        return self.products.operand(mixed.div_(norm)), norm

    def backward_(self, grad: Tensor) -> Tensor:
        normalize_backward_(grad, self.unit, self._mixed_operand_and_norm[1])
        grad.mul_(1.0 - self._scored(self.share).unsqueeze(1))
        return normalize_backward_(grad, self._direction, self.norm)

    def _unit(self, index: slice | Tensor) -> Tensor:
        return self._mixed(index) / self._mixed_operand_and_norm[1][index]

    def _mixed(self, index: slice | Tensor) -> Tensor:
        return torch.lerp(self._direction(index), self._scored(self.memory, index), self._scored(self.share, index).unsqueeze(1))


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of x [n, D] and their norms [n, 1], at least 1e-12."""
    norm = _norm(x)
    return x / norm, norm


def normalize_backward_(grad: Tensor, unit: Callable[[slice], Tensor], norm: Tensor) -> Tensor:
    """Turn the gradient of unit rows [n, D] into that of the rows themselves, in place. ``unit``: gives a slice of the unit rows."""
    for start in range(0, len(grad), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        direction = unit(block)
        along = torch.linalg.vecdot(grad[block], direction).unsqueeze(1)
        grad[block].addcmul_(direction, along, value=-1.0).div_(norm[block])
    return grad


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
