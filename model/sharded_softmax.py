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

import torch
import torch.nn.functional as F
from torch import Tensor

from model.anchor import Anchor, AnchorName, LearnedAnchor
from model.collectives import Collectives
from model.kernels.exp_logits import exp_logits, write_own
from model.margin import MarginGradient, curricular_negatives, margin_slope, margin_slope_in_m2, unified_margin
from model.norm_margin import SampleMargin

_EXP_LIMIT = 80.0  # float32 ends at exp(88.7): what is left holds a sum times the slope of a margin, in the place of the target
BLOCK_COLUMNS = 2048  # of what changes logits one by one: temporaries stay small and in cache


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
    scale: float
    margin_gradient: MarginGradient
    curricular: bool = False  # hard negatives count for more (CurricularFace, arXiv:2004.00288)
    interclass_filter: float | None = None  # negatives above this cosine are left out

    def target(self, term: Term, cosine: Tensor, margin: SampleMargin) -> tuple[Tensor, Tensor, Tensor]:
        """(target cosine under the margin, its slope in the cosine, its slope in m2) of ``term``, all shaped as ``cosine`` [B]."""
        if term.detached:
            return (1.0 - term.detached) * cosine, torch.ones_like(cosine), torch.zeros_like(cosine)
        m2_slope = torch.zeros_like(cosine) if margin.m2_slope is None else margin_slope_in_m2(cosine, margin.margin)
        return unified_margin(cosine, margin.margin), margin_slope(cosine, margin.margin, self.margin_gradient), m2_slope

    def loss(self, log_ratio: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """(L [n], dL/da [terms, n]) of the log-ratios a [terms, n]. ``held`` [terms, n] bool: whether a sample has the term."""
        log_ratio = log_ratio.masked_fill(~held, -math.inf)
        if self.joint:
            loss = softplus(torch.logsumexp(log_ratio, 0))
            return loss, torch.exp(log_ratio - loss)
        share = 1.0 / held.sum(0).clamp(min=1)
        return softplus(log_ratio).sum(0) * share, torch.sigmoid(log_ratio) * share


@dataclass(frozen=True)
class TargetCosines:
    """What all ranks together know of the samples and their own classes under one anchor."""

    cosine: Tensor  # [B] float64, 0 where the class has no such anchor
    held: Tensor  # [B] bool: the class has one

    def mean(self) -> Tensor:
        """Over the samples that have one, scalar float64; NaN if none has."""
        return self.cosine.sum() / self.held.sum()

    def mean_square(self) -> Tensor:
        """As :meth:`mean`, of the squares."""
        return self.cosine.square().sum() / self.held.sum()


@dataclass(frozen=True)
class Batch:
    """The global micro-batch, the same on every rank."""

    samples: Tensor  # [B, D] float32 unit rows
    cosines: dict[AnchorName, TargetCosines]
    margin: SampleMargin
    t: Tensor | None = None  # of CurricularFace, scalar; None without it


@dataclass(frozen=True)
class Walked:
    """Results. The gradients are of the mean loss over the global micro-batch, and None where none were asked for."""

    loss: Tensor  # scalar float32, equal on every rank
    grad_samples: Tensor | None  # [B, D] float32 with respect to the unit samples, from this rank's classes alone
    grad_centers: Tensor | None  # [S, D] float32 with respect to the unit rows of the scored class centers; None as well if w has none
    grad_norms: Tensor | None  # [B] float64 with respect to the samples' norms, equal on every rank; None where no margin depends on them
    grad_bias: Tensor | None  # scalar float64, equal on every rank; None where the loss has no bias
    hardest_negatives: Tensor | None  # [n] float32 of the first chunk, see ShardedSoftmax.walk; None where they were not asked for


@dataclass(frozen=True)
class Combined:
    """What the sums over all ranks make of the n samples of a chunk."""

    losses: Tensor  # [n]
    factors: Tensor  # [anchors, n]: dL/dcos_j of the mean loss over what the buffer holds for a negative j
    target_grads: Tensor  # [terms, n]: its dL/d(target cosine under the margin)
    grad_bias: Tensor | None = None  # scalar: its derivative in the bias


@dataclass(frozen=True)
class Targets:
    """Of each term and sample, [terms, n] float64: vectors over samples cost nothing, and the scale multiplies an error."""

    logit: Tensor  # margin-adjusted
    slope: Tensor  # of the target cosine under the margin in the cosine,
    slope_in_m2: Tensor  # and in m2
    held: Tensor  # bool: whether the sample has the term

    def of(self, rows: slice) -> Targets:
        return Targets(*(getattr(self, name)[:, rows] for name in ("logit", "slope", "slope_in_m2", "held")))


class ShardedSoftmax:
    """One micro-batch against one set of anchors."""

    sums_per_anchor = 1  # what a row of the buffer adds up to over ranks

    def __init__(self, anchors: dict[AnchorName, Anchor], objective: Objective, num_classes: int, chunk_rows: int, ranks: Collectives):
        """``num_classes``: C over all ranks; ``chunk_rows``: samples that share the buffer at a time."""
        self._anchors, self._objective, self._chunk_rows, self._ranks = anchors, objective, chunk_rows, ranks
        self._shifted = needs_shift(objective.scale, objective.curricular, num_classes)
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
                cosine[rows] = F.cosine_similarity(samples[rows].double(), anchor.own_rows(rows).double())
            held.copy_(anchor.columns >= 0)
        over_ranks = self._ranks.sum(own)()
        return {name: TargetCosines(cosine, held > 0) for name, (cosine, held) in zip(self._anchors, over_ranks, strict=True)}

    def walk(self, batch: Batch, gradients: bool, hardest: bool = False) -> Walked:
        """Loss and gradients, chunk by chunk; without ``gradients`` only the logits are multiplied out.

        Args:
            hardest: find the highest cosine to another class, for the samples of the first chunk; NaN where the loss does not show it.

        Collectives: per chunk one all-reduce of [anchors, sums_per_anchor, rows] float32, while the next product runs; where logits must be
            shifted one more of [rows] float32 per anchor; with ``hardest`` one of [rows] float32.
        """
        samples, targets = batch.samples, self._targets(batch)
        learned = self._anchors["learned"] if "learned" in self._negatives else None
        buffer = self._allocate_buffer(samples)
        grad_samples = torch.empty_like(samples) if gradients else None
        grad_centers = samples.new_zeros(learned.num_rows, samples.shape[1]) if gradients and learned else None
        grad_m2 = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
        loss, grad_bias = samples.new_zeros((), dtype=torch.float64), None
        found = None
        for rows in self._chunks(samples):
            x = samples[rows]
            sums = x.new_empty(len(self._negatives), self.sums_per_anchor, len(x))
            shifts = x.new_empty(len(self._negatives), len(x))
            pulls = []  # of each anchor, [n, D]: sum_j exp(s cos_j) u_j
            for k, name in enumerate(self._negatives):
                anchor = self._anchors[name]
                exps = buffer(anchor, len(x))
                sums[k], shifts[k] = self._score(name, rows, batch, exps)
                if k == len(self._negatives) - 1:
                    summing = self._ranks.sum(sums)  # the next product does not need them
                    if hardest and found is None:
                        found = self._hardest(exps, shifts[k], batch)
                if gradients:
                    pulls.append(anchor.products.mm(exps, anchor.operand))
            chunk = targets.of(rows)
            combined = self._combine(summing().double(), shifts, chunk, len(samples))
            loss += combined.losses.sum()
            if not gradients:
                continue
            grad_m2[rows] = (combined.target_grads * chunk.slope_in_m2).sum(0)
            if combined.grad_bias is not None:
                grad_bias = combined.grad_bias if grad_bias is None else grad_bias + combined.grad_bias
            grad_samples[rows] = sum(pull * factor.float().unsqueeze(1) for pull, factor in zip(pulls, combined.factors, strict=True))
            own_grads = combined.target_grads * chunk.slope
            for term, grad in zip(self._objective.terms, own_grads, strict=True):
                grad_samples[rows].addcmul_(self._anchors[term.target].own_rows(rows), grad.float().unsqueeze(1))
            if grad_centers is not None:  # the class centers came last: exps are theirs
                own_grad = sum(grad for term, grad in zip(self._objective.terms, own_grads, strict=True) if term.target == "learned")
                self._add_grad_centers(grad_centers, learned, rows, x, exps, combined.factors[-1], own_grad)
        return self._walked(batch.margin, loss, grad_samples, grad_centers, grad_m2, grad_bias, found)

    @staticmethod
    def _walked(
        margin: SampleMargin, loss: Tensor, grad_samples: Tensor | None, grad_centers, grad_m2: Tensor, grad_bias, hardest: Tensor | None
    ) -> Walked:
        """Add what the norms have to do with it."""
        loss, grad_norms = loss / len(grad_m2), None
        if margin.penalty is not None:
            loss = loss + margin.penalty.mean()
        if margin.m2_slope is not None and grad_samples is not None:
            grad_norms = grad_m2 * margin.m2_slope + margin.penalty_slope / len(grad_m2)
        return Walked(loss.float(), grad_samples, grad_centers, grad_norms, grad_bias, hardest)

    @staticmethod
    def _add_grad_centers(
        total: Tensor, learned: LearnedAnchor, rows: slice, x: Tensor, exps: Tensor, factors: Tensor, own_grad: Tensor
    ) -> None:
        """Add ``sum_i dL/dcos_ij x_i`` of a chunk to ``total`` [S, D].

        dL/dcos_ij is ``exps_ij factors_i`` for negatives. One product does for targets as well if the place of the target, where exps are
        0, holds ``own_grad_i / factors_i``. Without any negative that is 0 / 0, and the gradient 0.
        """
        write_own(exps, learned.columns[rows], (own_grad / factors).nan_to_num_(0.0))
        learned.products.add_mm(total, exps.T, learned.products.operand(x * factors.float().unsqueeze(1)))

    def _targets(self, batch: Batch) -> Targets:
        objective, of_terms = self._objective, []
        for term in objective.terms:
            cosine, slope, slope_in_m2 = objective.target(term, batch.cosines[term.target].cosine, batch.margin)
            of_terms.append((objective.scale * cosine, slope, slope_in_m2, batch.cosines[term.target].held))
        return Targets(*(torch.stack(parts) for parts in zip(*of_terms, strict=True)))

    def _score(self, name: AnchorName, rows: slice, batch: Batch, exps: Tensor) -> tuple[Tensor, Tensor]:
        """Score the samples ``rows`` [n] of the batch against the negatives of the anchor ``name``.

        Writes exp(s cos_j - shift) to ``exps`` [n, S], under CurricularFace times its slope, and 0 in the own column and where a negative
        is filtered out. Returns (row sums of exp(s cos_j - shift) [1, n], shift [n]).
        """
        anchor, x = self._anchors[name], batch.samples[rows]
        products = anchor.products
        scaled = products.operand(x * self._objective.scale)
        if self._shifted or batch.t is not None or self._objective.interclass_filter is not None:
            logits = products.mm(scaled, anchor.operand.T, out=exps if exps.dtype == torch.float32 else None)
            self._filter(logits)
            slope = None if batch.t is None else self._modulate(logits, batch.cosines[name].cosine[rows], batch)
            write_own(logits, anchor.columns[rows], logits.new_full((len(x),), -math.inf))
            shift = self._highest(logits) if self._shifted else logits.new_zeros(len(x))
            sums = logits.sub_(shift.unsqueeze(1)).exp_().sum(1)
            if slope is not None:
                logits.mul_(slope)
            if exps is not logits:
                exps.copy_(logits)
        else:
            sums, shift = exp_logits(scaled, anchor.operand, anchor.columns[rows], exps), x.new_zeros(len(x))
        self._round(anchor, exps)
        return sums.unsqueeze(0), shift

    def _filter(self, logits: Tensor) -> None:
        """Inter-class filtering: leave out the negatives of ``logits`` [n, S] whose cosine is above the limit."""
        if self._objective.interclass_filter is not None:
            for part in logits.split(BLOCK_COLUMNS, 1):
                part.masked_fill_(part > self._objective.interclass_filter * self._objective.scale, -math.inf)

    @staticmethod
    def _round(anchor: Anchor, exps: Tensor) -> None:
        """Round ``exps`` [n, S] to the dtype of products where these take it from float32."""
        if anchor.products.rounds_in_float32:
            for part in exps.split(BLOCK_COLUMNS, 1):
                part.copy_(anchor.products.operand(part))

    def _modulate(self, logits: Tensor, target_cosine: Tensor, batch: Batch) -> Tensor:
        """CurricularFace: change ``logits`` [n, S] in place and return the slopes. ``target_cosine``: [n] without the margin."""
        hardest = unified_margin(target_cosine, batch.margin.margin).float().unsqueeze(1)  # in every centers mode
        slope = torch.empty_like(logits)
        for part, part_slope in zip(logits.split(BLOCK_COLUMNS, 1), slope.split(BLOCK_COLUMNS, 1), strict=True):
            cosine, change = curricular_negatives(part / self._objective.scale, hardest, batch.t)
            torch.mul(cosine, self._objective.scale, out=part)
            part_slope.copy_(change)
        return slope

    def _highest(self, logits: Tensor) -> Tensor:
        """[n] the highest of each row over all ranks, finite where there is none. Collectives: one all-reduce of [n]."""
        highest = logits.amax(1) if logits.shape[1] else logits.new_full((len(logits),), -math.inf)
        return self._ranks.maximum(highest)().clamp_(min=torch.finfo(highest.dtype).min)

    def _hardest(self, exps: Tensor, shift: Tensor, batch: Batch) -> Tensor:
        """[n] the highest cosine to a negative over all ranks, from what :meth:`_score` left; NaN under CurricularFace, which changed it.

        -inf where there is no negative. Collectives: one all-reduce of [n].
        """
        highest = exps.amax(1).float() if exps.shape[1] else shift.new_zeros(len(exps))
        cosine = self._ranks.maximum((highest.log() + shift) / self._objective.scale)()
        return torch.full_like(cosine, math.nan) if batch.t is not None else cosine

    def _combine(self, sums: Tensor, shifts: Tensor, targets: Targets, B: int) -> Combined:
        """From what all ranks know of the n samples of a chunk to the loss and its slopes.

        ``sums`` [anchors, 1, n], ``shifts`` [anchors, n]: see :meth:`_score`; the former summed over ranks.
        """
        terms = [self._negatives.index(term.negatives) for term in self._objective.terms]
        sums = sums.squeeze(1)
        log_sums = sums.log() + shifts
        losses, p = self._objective.loss(torch.stack([log_sums[k] for k in terms]) - targets.logit, targets.held)
        p *= self._objective.scale / B
        of_anchor = [sum(p[i] for i, k in enumerate(terms) if k == anchor) for anchor in range(len(sums))]
        return Combined(losses, (torch.stack(of_anchor) / sums).masked_fill_(sums == 0.0, 0.0), -p)

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


def needs_shift(scale: float, curricular: bool, num_classes: int) -> bool:
    """Whether the maximum must be taken off the logits of ``num_classes`` classes before their exponentials.

    |s cos| <= s, and CurricularFace at most doubles it: while s + ln C < 80, exponentials cannot overflow.
    """
    return scale * (1 + curricular) + math.log(num_classes) > _EXP_LIMIT


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), with its relative precision however small (F.softplus cuts off)."""
    return torch.logaddexp(x, torch.zeros_like(x))
