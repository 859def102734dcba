"""The kernel of the head: a margin softmax over sharded classes whose loss and gradients are finished in one walk over the batch.

With B samples in the global micro-batch, S scored classes and the scale s, a loss has one term or two. Each scores its negatives against
one anchor (the class centers w or the expectations e) and takes its target from one:

    z_y = s (cos(m1 theta_y + m2) - m3)                        margin-adjusted target logit (model.margin)
    a   = log sum_{j in S, j != y} exp(s cos_j) - z_y          log-ratio of negatives and target, one a term
    L   = log(exp(0) + sum_terms exp(a))                       joint; or the mean over the terms of log(1 + exp(a))
    p   = dL/da,   dL/d(s cos_j) = p exp(s cos_j) / sum,   dL/dz_y = -p

Nothing of size [B, S] exists: chunks of rows share one [chunk, S] buffer (CurricularFace has a second, for its slopes). The expectations
come first in it, because all that they leave is a [chunk, D] product; the exponentials of the class centers stay until the sums over ranks
are known, which their gradient needs.

The joint two-term loss: LVFace, arXiv:2501.13420. The sharding: Partial FC, arXiv:2203.15565.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import Collectives
from model.kernels.exp_logits import exp_logits, write_own
from model.kernels.products import Products
from model.margin import MarginGradient, curricular_negatives, margin_slope, unified_margin

AnchorName = Literal["expectation", "learned"]
_EXP_LIMIT = 80.0  # float32 ends at exp(88.7): what is left holds a sum times the slope of a margin, in the place of the target
_BLOCK_ROWS = 1024  # of a normalisation's backward, and
_BLOCK_COLUMNS = 2048  # of CurricularFace: temporaries stay small and in cache


@dataclass(frozen=True)
class Anchor:
    """One set of directions that the samples are scored against."""

    table: Tensor  # [c, D] float32: this rank's rows
    rows: Tensor | None  # [S] int64 sorted rows of the table that are scored; None: all
    columns: Tensor  # [B] int64 place of each sample's own class among them, -1 where this rank does not hold it
    learned: bool  # a gradient reaches the rows, which are normalised here; else they are unit rows already
    products: Products

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.table if self.rows is None else self.rows)

    @property
    def operand(self) -> Tensor:
        """[S, D] unit rows, as an operand of products."""
        return self._unit_and_norm[0]

    @property
    def norm(self) -> Tensor:
        """[S, 1] float32 norms of learned rows, at least 1e-12."""
        return self._unit_and_norm[1]

    def unit(self, index: slice | Tensor) -> Tensor:
        """[n, D] float32 unit rows of the scored places ``index``."""
        if self.products.exact:
            return self.operand[index]
        rows = self.table[index] if self.rows is None else self.table[self.rows[index]]
        return rows / self.norm[index] if self.learned else rows

    @cached_property
    def _unit_and_norm(self) -> tuple[Tensor, Tensor | None]:
        rows = self.table if self.rows is None else self.table.index_select(0, self.rows)
        if not self.learned:
            return self.products.operand(rows), None
        norm = _norm(rows)
        unit = rows / norm if rows is self.table else rows.div_(norm)  # a selection is a copy already
        return self.products.operand(unit), norm


@dataclass(frozen=True)
class Term:
    """One term of the loss."""

    negatives: AnchorName
    target: AnchorName
    detached: float = 0.0  # k > 0: the target logit is s (cos - k cos.detach()) and has no margin (EPL, arXiv:2405.12447)


@dataclass(frozen=True)
class Objective:
    """What the loss is."""

    terms: tuple[Term, ...]
    joint: bool  # one logarithm over all terms; else the mean of separate losses over the terms that a sample has
    margin: tuple[float, float, float]
    scale: float
    margin_gradient: MarginGradient
    curricular: bool  # hard negatives count for more (CurricularFace, arXiv:2004.00288)

    def target(self, term: Term, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """(target cosine under the margin, its slope) of ``term``, both shaped as ``cosine``."""
        if term.detached:
            return (1.0 - term.detached) * cosine, torch.ones_like(cosine)
        return unified_margin(cosine, self.margin), margin_slope(cosine, self.margin, self.margin_gradient)

    def loss(self, log_ratio: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """(L [n], dL/da [terms, n]) of the log-ratios a [terms, n]. ``held`` [terms, n] bool: whether a sample has the term."""
        log_ratio = log_ratio.masked_fill(~held, -math.inf)
        if self.joint:
            loss = _softplus(torch.logsumexp(log_ratio, 0))
            return loss, torch.exp(log_ratio - loss)
        share = 1.0 / held.sum(0).clamp(min=1)
        return _softplus(log_ratio).sum(0) * share, torch.sigmoid(log_ratio) * share


@dataclass(frozen=True)
class TargetCosines:
    """What all ranks together know of the samples and their own classes under one anchor."""

    cosine: Tensor  # [B] float64, 0 where the class has no such anchor
    held: Tensor  # [B] bool: the class has one

    def mean(self) -> Tensor:
        """Over the samples that have one, scalar float64; NaN if none has."""
        return self.cosine.sum() / self.held.sum()


@dataclass(frozen=True)
class Walked:
    """Results. The gradients are of the mean loss over the global micro-batch, and None where none were asked for."""

    loss: Tensor  # scalar float32, equal on every rank
    grad_samples: Tensor | None  # [B, D] float32 with respect to the unit samples, from this rank's classes alone
    grad_centers: Tensor | None  # [S, D] float32 with respect to the unit rows of the scored class centers; None as well if w has none


class ShardedSoftmax:
    """One micro-batch against one set of anchors."""

    def __init__(self, anchors: dict[AnchorName, Anchor], objective: Objective, num_classes: int, chunk_rows: int, ranks: Collectives):
        """``num_classes``: C over all ranks; ``chunk_rows``: samples that share the buffer at a time."""
        self._anchors, self._objective, self._chunk_rows, self._ranks = anchors, objective, chunk_rows, ranks
        # |s cos| <= s, and CurricularFace at most doubles it: while s + ln C < 80, exponentials cannot overflow and need no maximum.
        self._shifted = objective.scale * (1 + objective.curricular) + math.log(num_classes) > _EXP_LIMIT
        self._negatives: list[AnchorName] = sorted({term.negatives for term in objective.terms})  # the learned one last
        for name in self._negatives:
            _ = anchors[name].operand  # normalise now: the samples may still be on their way

    def target_cosines(self, samples: Tensor) -> dict[AnchorName, TargetCosines]:
        """Of ``samples`` [B, D] float32 unit rows, equal on every rank. Collectives: one all-reduce of [anchors, 2, B] float64.

        In float64, because what a margin makes of a cosine near 1 multiplies its error.
        """
        own = samples.new_zeros(len(self._anchors), 2, len(samples), dtype=torch.float64)
        for (cosine, held), anchor in zip(own, self._anchors.values(), strict=True):
            for rows in self._chunks(samples):
                cosine[rows] = F.cosine_similarity(samples[rows].double(), _own_rows(anchor, rows).double())
            held.copy_(anchor.columns >= 0)
        over_ranks = self._ranks.sum(own)()
        return {name: TargetCosines(cosine, held > 0) for name, (cosine, held) in zip(self._anchors, over_ranks, strict=True)}

    def walk(self, samples: Tensor, cosines: dict[AnchorName, TargetCosines], t: Tensor | None, gradients: bool) -> Walked:
        """Loss and gradients, chunk by chunk.

        Args:
            samples, cosines: as of :meth:`target_cosines`.
            t: of CurricularFace, scalar; None without it.
            gradients: without them only the logits are multiplied out.
        Collectives: per chunk one all-reduce of [anchors, rows] float32, while the next product runs; where logits must be shifted one
            more of [rows] float32 per anchor.
        """
        targets = self._targets(cosines)
        learned = self._anchors["learned"] if "learned" in self._negatives else None
        buffer = self._allocate_buffer(samples)
        grad_samples = torch.empty_like(samples) if gradients else None
        grad_centers = samples.new_zeros(learned.num_rows, samples.shape[1]) if gradients and learned else None
        loss = samples.new_zeros((), dtype=torch.float64)
        for rows in self._chunks(samples):
            x = samples[rows]
            sums, shifts = x.new_empty(2, len(self._negatives), len(x))
            pulls = []  # of each anchor, [n, D]: sum_j exp(s cos_j) u_j
            for k, name in enumerate(self._negatives):
                anchor = self._anchors[name]
                exps = buffer(anchor, len(x))
                sums[k], shifts[k] = self._exponentials(anchor, rows, x, cosines[name].cosine, t, exps)
                if k == len(self._negatives) - 1:
                    summing = self._ranks.sum(sums)  # the next product does not need them
                if gradients:
                    pulls.append(anchor.products.mm(exps, anchor.operand))
            losses, factors, target_grads = self._combine(summing().double(), shifts, targets[:, :, rows], len(samples))
            loss += losses.sum()
            if gradients:
                grad_samples[rows] = sum(pull * factor.float().unsqueeze(1) for pull, factor in zip(pulls, factors, strict=True))
                for term, grad in zip(self._objective.terms, target_grads, strict=True):
                    grad_samples[rows].addcmul_(_own_rows(self._anchors[term.target], rows), grad.float().unsqueeze(1))
            if grad_centers is not None:  # the class centers came last: exps are theirs
                own_grad = sum(grad for term, grad in zip(self._objective.terms, target_grads, strict=True) if term.target == "learned")
                self._add_grad_centers(grad_centers, learned, rows, x, exps, factors[-1], own_grad)
        return Walked((loss / len(samples)).float(), grad_samples, grad_centers)

    @staticmethod
    def _add_grad_centers(total: Tensor, learned: Anchor, rows: slice, x: Tensor, exps: Tensor, factors: Tensor, own_grad: Tensor) -> None:
        """Add ``sum_i dL/dcos_ij x_i`` of a chunk to ``total`` [S, D].

        dL/dcos_ij is ``exps_ij factors_i`` for negatives. One product does for targets as well if the place of the target, where exps are
        0, holds ``own_grad_i / factors_i``. Without any negative that is 0 / 0, and the gradient 0.
        """
        write_own(exps, learned.columns[rows], (own_grad / factors).nan_to_num_(0.0))
        learned.products.add_mm(total, exps.T, learned.products.operand(x * factors.float().unsqueeze(1)))

    def _targets(self, cosines: dict[AnchorName, TargetCosines]) -> Tensor:
        """[3, terms, B]: margin-adjusted target logits; slopes of the margin; 1 where a sample has the term, else 0.

        Vectors over samples are float64: they cost nothing, and the scale multiplies an error.
        """
        objective, rows = self._objective, []
        for term in objective.terms:
            cosine, slope = objective.target(term, cosines[term.target].cosine)
            rows.append(torch.stack([objective.scale * cosine, slope, cosines[term.target].held]))
        return torch.stack(rows, 1)

    def _exponentials(
        self, anchor: Anchor, rows: slice, x: Tensor, target_cosine: Tensor, t: Tensor | None, exps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score samples x [n, D], which are ``rows`` of the batch, against the negatives of ``anchor``.

        Writes exp(s cos_j - shift) to ``exps`` [n, S], under CurricularFace times its slope, and 0 in the own column. Returns (row sums of
        exp(s cos_j - shift) [n], shift [n]).
        """
        products = anchor.products
        scaled = products.operand(x * self._objective.scale)
        if self._shifted or t is not None:
            logits = products.mm(scaled, anchor.operand.T, out=exps if exps.dtype == torch.float32 else None)
            slope = None if t is None else self._modulate(logits, target_cosine[rows], t)
            write_own(logits, anchor.columns[rows], logits.new_full((len(x),), -math.inf))
            shift = self._highest(logits) if self._shifted else logits.new_zeros(len(x))
            sums = logits.sub_(shift.unsqueeze(1)).exp_().sum(1)
            if slope is not None:
                logits.mul_(slope)
            if exps is not logits:
                exps.copy_(logits)
        else:
            sums, shift = exp_logits(scaled, anchor.operand, anchor.columns[rows], exps), x.new_zeros(len(x))
        if products.rounds_in_float32:
            for part in exps.split(_BLOCK_COLUMNS, 1):
                part.copy_(products.operand(part))
        return sums, shift

    def _modulate(self, logits: Tensor, target_cosine: Tensor, t: Tensor) -> Tensor:
        """CurricularFace: change ``logits`` [n, S] in place and return the slopes. ``target_cosine``: [n] without the margin."""
        hardest = unified_margin(target_cosine, self._objective.margin).float().unsqueeze(1)
        slope = torch.empty_like(logits)
        for part, part_slope in zip(logits.split(_BLOCK_COLUMNS, 1), slope.split(_BLOCK_COLUMNS, 1), strict=True):
            cosine, change = curricular_negatives(part / self._objective.scale, hardest, t)
            torch.mul(cosine, self._objective.scale, out=part)
            part_slope.copy_(change)
        return slope

    def _highest(self, logits: Tensor) -> Tensor:
        """[n] the highest of each row over all ranks, finite where there is none. Collectives: one all-reduce of [n]."""
        highest = logits.amax(1) if logits.shape[1] else logits.new_full((len(logits),), -math.inf)
        return self._ranks.maximum(highest)().clamp_(min=torch.finfo(highest.dtype).min)

    def _combine(self, sums: Tensor, shifts: Tensor, targets: Tensor, B: int) -> tuple[Tensor, Tensor, Tensor]:
        """From what all ranks know of the n samples of a chunk to the loss and its slopes.

        Args:
            sums, shifts: [anchors, n], see :meth:`_exponentials`; summed over ranks.
            targets: [3, terms, n], see :meth:`_targets`.
        Returns: losses [n]; dL/dcos_j of the mean loss over exps_j, [anchors, n]; its dL/dcos_y [terms, n].
        """
        target_logits, slopes, held = targets
        terms = [self._negatives.index(term.negatives) for term in self._objective.terms]
        log_sums = sums.log() + shifts
        losses, p = self._objective.loss(torch.stack([log_sums[k] for k in terms]) - target_logits, held > 0)
        p *= self._objective.scale / B
        of_anchor = [sum(p[i] for i, k in enumerate(terms) if k == anchor) for anchor in range(len(sums))]
        return losses, (torch.stack(of_anchor) / sums).masked_fill_(sums == 0.0, 0.0), -p * slopes

    def _chunks(self, samples: Tensor) -> list[slice]:
        return [slice(start, min(start + self._chunk_rows, len(samples))) for start in range(0, len(samples), self._chunk_rows)]

    def _allocate_buffer(self, samples: Tensor) -> Callable[[Anchor, int], Tensor]:
        """What gives an anchor its [n, S] matrix for a chunk: always the same memory."""
        on_cpu, products = samples.device.type == "cpu", self._anchors[self._negatives[0]].products

        def width(anchor: Anchor) -> int:  # a GPU reads whole vectors where rows start at multiples of 16
            return anchor.num_rows if on_cpu else -(-anchor.num_rows // 16) * 16

        size = min(self._chunk_rows, len(samples)) * max(width(self._anchors[name]) for name in self._negatives)
        memory = torch.empty(size, dtype=products.storage, device=samples.device)

        def buffer(anchor: Anchor, n: int) -> Tensor:
            flat = memory[: n * width(anchor)]
            if on_cpu:  # MKL writes rows of n faster than rows of S: a third of the logits' time
                return flat.view(anchor.num_rows, n).T
            return flat.view(n, width(anchor))[:, : anchor.num_rows]

        return buffer


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of x [n, D] and their norms [n, 1], at least 1e-12."""
    norm = _norm(x)
    return x / norm, norm


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), with its relative precision however small (F.softplus cuts off)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)


def normalize_backward_(grad: Tensor, unit: Callable[[slice], Tensor], norm: Tensor) -> Tensor:
    """Turn the gradient of unit rows [n, D] into that of the rows themselves, in place. ``unit``: gives a slice of the unit rows."""
    for start in range(0, len(grad), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        direction = unit(block)
        along = torch.linalg.vecdot(grad[block], direction).unsqueeze(1)
        grad[block].addcmul_(direction, along, value=-1.0).div_(norm[block])
    return grad


def _own_rows(anchor: Anchor, rows: slice) -> Tensor:
    """[n, D] float32: the unit row of each sample's own class, 0 where this rank does not hold it."""
    columns = anchor.columns[rows]
    if not anchor.num_rows:
        return anchor.table.new_zeros(len(columns), anchor.table.shape[1])
    return anchor.unit(columns.clamp(min=0)).masked_fill_((columns < 0).unsqueeze(1), 0.0)
