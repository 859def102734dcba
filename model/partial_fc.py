"""Partial-FC: a margin softmax over class centers that are sharded over all ranks, with its loss and gradients finished in forward.

METHOD of the head, with B samples in the global micro-batch and S the scored classes:

    z_y = s (cos(m1 theta_y + m2) - m3)                       margin-adjusted target logit (model.margin)
    a   = log sum_{j in S, j != y} exp(s cos_j) - z_y          negatives against the class centers w
    b   = log sum_{j in S, j != y} exp(s cos^e_j) - z^e_y      negatives against the expectations e (``pco`` only)
    L   = log(exp(0) + exp(a) + exp(b))                        LVFace, arXiv:2501.13420; without b it is the softmax cross-entropy
    dL/d(s cos_j) = exp(s cos_j - z_y - L),  dL/dz_y = -exp(a - L),  and the same with e for b

Nothing of size [B, C] exists: rows are walked in chunks that share one buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.class_shard import ClassShard, initial_centers, sample_centers
from model.collectives import Collectives
from model.margin import MARGIN_GRADIENTS, MarginGradient, check_margin, margin_slope, unified_margin
from model.optimizer import CentersOptimizerKind, build_centers_optimizer, coalesce_rows
from model.prototypes import Expectation

Centers = Literal["learned", "pco"]
CENTERS = ("learned", "pco")
MAX_SCALE = 128.0
_CHUNK_ROWS = 512
_EXP_LIMIT = 88.0  # exp of it is below the float32 maximum, exp(88.7)


class PartialFC:
    """The class centers of one rank, their loss, gradients and optimizer.

    Not an ``nn.Module``: the DeepSpeed engine must neither shard, cast, average nor save it (it would keep rank 0's rows alone).

    Per optimizer step, call it once per micro-batch, backward each loss through the engine, then :meth:`step` if the engine's step was
    applied, else :meth:`discard`. The gradient of the centers is the mean over the micro-batches since then: no loss scale, no factor
    world_size, no all-reduce. If a gradient on any rank is not finite, ``backward`` hands ``inf`` to the engine on every rank, so that it
    skips the step everywhere.

    On CUDA the choice of positives waits for the device a few times per call (``nonzero``, ``unique``, the check of the labels).
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        margin: tuple[float, float, float] = (1.0, 0.5, 0.0),
        scale: float = 64.0,
        margin_gradient: MarginGradient = "exact",
        centers: Centers = "learned",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        *,
        optimizer: CentersOptimizerKind = "row_sparse",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            embedding_size: D.
            num_classes: C over all ranks.
            sample_rate: share of each rank's centers scored per step, in (0, 1].
            margin: (m1, m2, m3): factor on the angle, radians, cosine; see :func:`model.margin.unified_margin`.
            scale: s of the logits, in (0, 128]; beyond, float32 exponentials no longer hold the range of the negatives.
            margin_gradient: ``exact`` or ``straight_through``; see :func:`model.margin.margin_slope`.
            centers: ``learned`` scores against w; ``pco`` adds the expectation as a second anchor.
            group: process group that shares the classes; None: the default group, or one process that owns every class.
            seed: of the initial centers and of the sampling.
            optimizer: ``row_sparse`` touches sampled rows only; ``dense`` is the field's AdamW over all rows.
            betas, eps: of AdamW.
            device: of the centers; None: the current GPU under an nccl group, else torch's default device.

        Raises:
            ValueError: an argument outside its range.
        """
        if margin_gradient not in MARGIN_GRADIENTS:
            raise ValueError(f"margin_gradient must be one of {', '.join(MARGIN_GRADIENTS)}, got {margin_gradient!r}")
        if not 0 < scale <= MAX_SCALE:
            raise ValueError(f"scale must lie in (0, {MAX_SCALE:g}], got {scale}")
        if num_classes < 1 or embedding_size < 1:
            raise ValueError(f"num_classes and embedding_size must be positive, got {num_classes} and {embedding_size}")
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if device is None:
            nccl = group is not None and dist.get_backend(group) == "nccl"
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.get_default_device()
        self._ranks = Collectives(group)
        self.shard = ClassShard(num_classes, self._ranks.rank, self._ranks.world_size)
        self.margin, self.scale, self.margin_gradient = check_margin(margin), float(scale), margin_gradient
        self._weight = initial_centers(self.shard, embedding_size, seed).to(device)
        self._optimizer = build_centers_optimizer(optimizer, self._weight, betas, eps)
        self._expectation = Expectation(len(self.shard), embedding_size, device)
        self._seed, self._draws = seed, 0
        self._pending: list[_Pending] = []
        self.target_cosine = torch.zeros((), device=device)  # mean cos_y of the last global micro-batch, before the margin
        self.set_stage(sample_rate, centers, update_expectation=False)

    def set_stage(self, sample_rate: float, centers: Centers, update_expectation: bool) -> None:
        """Switch what the next forward scores and whether :meth:`step` moves the expectation; ValueError for a value outside its range."""
        if not 0.0 < sample_rate <= 1.0:
            raise ValueError(f"sample_rate must lie in (0, 1], got {sample_rate}")
        if centers not in CENTERS:
            raise ValueError(f"centers must be one of {', '.join(CENTERS)}, got {centers!r}")
        self.sample_rate, self.centers, self.update_expectation = float(sample_rate), centers, bool(update_expectation)

    @property
    def num_classes(self) -> int:
        return self.shard.num_classes

    @property
    def class_start(self) -> int:
        """The class of ``weight[0]``."""
        return self.shard.start

    @property
    def weight(self) -> Tensor:
        """[c, D] float32: the class centers of this rank. Assigning copies into them, because the optimizer holds on to the tensor."""
        return self._weight

    @weight.setter
    def weight(self, rows: Tensor) -> None:
        self._weight.copy_(rows)

    @property
    def expectation(self) -> Tensor:
        """[c, D] float32: unit rows where :attr:`expectation_seen`, zero elsewhere."""
        return self._expectation.rows

    @property
    def expectation_seen(self) -> Tensor:
        """[c] bool: classes of which an embedding was averaged in."""
        return self._expectation.seen

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of the global micro-batch.

        Args:
            embeddings: [b, D], any floating dtype, not normalised; the same b on every rank.
            labels: [b] int64 global classes.

        Returns: scalar float32, the mean over all B = b * world_size samples, equal on every rank. Its backward gives
            ``embeddings.grad = W * g * dL/dembeddings`` with g the gradient that arrives (loss scale and 1/accumulation included): the
            engine averages over the W ranks. Without gradients (``torch.no_grad``) it scores the set that the next training call would.

        Raises:
            ValueError: a label outside [0, C), on every rank.

        Collectives: all-gathers of [b, D] float32 and [b] int64; per chunk one all-reduce of [anchors, 3, rows] float32; with gradients one
            reduce-scatter of [B, D] and one all-reduce of a flag.
        """
        targets = self._gather_targets(labels)
        with_gradients = torch.is_grad_enabled() and embeddings.requires_grad
        scored = None
        if self.sample_rate < 1.0:
            scored = sample_centers(self.shard, targets[targets >= 0], self.sample_rate, self._seed, self._draws)
        if with_gradients:
            self._draws += 1
        return _ShardedMarginSoftmax.apply(embeddings, self, targets, scored, with_gradients)

    def _gather_targets(self, labels: Tensor) -> Tensor:
        """Local row of every label of the global micro-batch, [B] int64, -1 where another rank owns it."""
        gathered = self._ranks.gather(labels.reshape(-1).to(torch.int64))
        outside = ((gathered < 0) | (gathered >= self.num_classes)).nonzero()
        if outside.numel():
            position = int(outside[0])
            rank, sample = divmod(position, gathered.numel() // self._ranks.world_size)
            raise ValueError(f"label {int(gathered[position])} of sample {sample} on rank {rank} lies outside [0, {self.num_classes})")
        return self.shard.localize(gathered)

    def pending_gradient(self) -> tuple[Tensor, Tensor]:
        """(sorted local rows [S] int64, dL/dw of those rows [S, D] float32): the mean over the micro-batches since the last step."""
        if not self._pending:
            rows = torch.empty(0, dtype=torch.int64, device=self.weight.device)
            return rows, self.weight.new_empty(0, self.weight.shape[1])
        rows, grad = coalesce_rows([(p.rows, p.grad) for p in self._pending])
        return rows, grad if len(self._pending) == 1 else grad / len(self._pending)

    def gradient_norm(self) -> Tensor:
        """L2 norm of the pending gradient over all ranks, scalar float64. Collectives: one all-reduce of a float64."""
        square = self.pending_gradient()[1].double().square().sum()
        self._ranks.sum(square)
        return square.sqrt()

    def step(self, lr: float, weight_decay: float) -> None:
        """Apply the pending gradient to the centers and, if the stage says so, the pending samples to the expectation."""
        rows, grad = self.pending_gradient()
        self._optimizer.step(rows, grad, lr=lr, weight_decay=weight_decay)
        if self.update_expectation and self._pending:
            self._expectation.update(torch.cat([p.targets for p in self._pending]), torch.cat([p.samples for p in self._pending]))
        self.discard()

    def discard(self) -> None:
        """Drop the pending gradient and samples: the step was skipped."""
        self._pending.clear()

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this rank's rows ``[class_start, class_start + c)``; tensors are not copied."""
        rows = {"weight": self.weight, "expectation": self.expectation, "expectation_seen": self.expectation_seen}
        return {**rows, **self._optimizer.state(), "draws": torch.tensor(self._draws)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over :meth:`state` of the same rows; ValueError if their number or size differs."""
        if state["weight"].shape != self.weight.shape:
            raise ValueError(f"centers of shape {tuple(state['weight'].shape)} do not fit this rank's {tuple(self.weight.shape)}")
        self.weight.copy_(state["weight"])
        self.expectation.copy_(state["expectation"])
        self.expectation_seen.copy_(state["expectation_seen"])
        self._optimizer.load_state(state)
        self._draws = int(state["draws"])
        self.discard()


@dataclass(frozen=True)
class _Pending:
    """What one micro-batch leaves for :meth:`PartialFC.step`."""

    rows: Tensor  # [S] int64 sorted local rows
    grad: Tensor  # [S, D] float32
    targets: Tensor  # [n] int64 local rows of the global micro-batch's samples that this rank owns
    samples: Tensor  # [n, D] float32 their unit embeddings


class _ShardedMarginSoftmax(torch.autograd.Function):
    """Loss and both gradients in forward; backward only hands them on, so no [B, S] matrix outlives its chunk."""

    @staticmethod
    def forward(ctx, embeddings: Tensor, head: PartialFC, targets: Tensor, scored: Tensor | None, with_gradients: bool) -> Tensor:
        unit, norm = _normalize(embeddings.detach().float())
        gathered = head._ranks.gather(unit)
        anchors = [_learned_anchor(head, targets, scored)]
        if head.centers == "pco":
            anchors.append(_expectation_anchor(head, targets, scored))
        pass_ = _ChunkedPass(head, gathered, anchors, with_gradients)
        loss = pass_.run()
        head.target_cosine = pass_.target_cosine.float()
        if with_gradients:
            ctx.head, ctx.dtype = head, embeddings.dtype
            ctx.feature_grad = _normalize_backward(head._ranks.scatter_sum(pass_.grad_samples), unit, norm)
            rows = torch.arange(len(head.shard), device=unit.device) if scored is None else scored
            owned = (targets >= 0).nonzero().squeeze(1) if head.update_expectation else targets[:0]
            ctx.pending = _Pending(rows, pass_.grad_centers, targets[owned], gathered[owned])
            ctx.not_finite = (~(ctx.feature_grad.isfinite().all() & pass_.grad_centers.isfinite().all())).float()
            head._ranks.sum(ctx.not_finite)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        head = ctx.head
        head._pending.append(ctx.pending)
        grad = ctx.feature_grad * (grad_loss * head._ranks.world_size)
        grad = torch.where(ctx.not_finite > 0, math.inf, grad)
        ctx.feature_grad = ctx.pending = None
        return grad.to(ctx.dtype), None, None, None, None


@dataclass(frozen=True)
class _Anchor:
    """One set of centers that the samples are scored against."""

    unit: Tensor  # [S, D] float32 unit rows
    norm: Tensor | None  # [S, 1] their norms before; None: no gradient reaches them
    columns: Tensor  # [B] int64 column of each sample's own class, -1 where this rank does not hold it


def _learned_anchor(head: PartialFC, targets: Tensor, scored: Tensor | None) -> _Anchor:
    weight = head.weight if scored is None else head.weight[scored]
    return _Anchor(*_normalize(weight), _columns(targets, scored))


def _expectation_anchor(head: PartialFC, targets: Tensor, scored: Tensor | None) -> _Anchor:
    """Expectations of the scored classes that have one: an unseen class is no negative, and its samples have no second anchor."""
    seen = head.expectation_seen.nonzero().squeeze(1)
    if scored is not None:
        seen = scored[head.expectation_seen[scored]]
    return _Anchor(head.expectation[seen], None, _columns(targets, seen))


def _columns(targets: Tensor, rows: Tensor | None) -> Tensor:
    """Where each target stands in the sorted ``rows`` (None: all rows); -1 if it does not."""
    if rows is None:
        return targets
    if rows.numel() == 0:
        return torch.full_like(targets, -1)
    position = torch.searchsorted(rows, targets).clamp_(max=rows.numel() - 1)
    return torch.where(rows[position] == targets, position, -1)


class _ChunkedPass:
    """One walk over the rows of the gathered batch, with one [chunk, S] buffer per anchor."""

    def __init__(self, head: PartialFC, gathered: Tensor, anchors: list[_Anchor], with_gradients: bool) -> None:
        self._head, self._x, self._anchors, self._with_gradients = head, gathered, anchors, with_gradients
        # |s cos| <= s: exp cannot overflow unshifted while s + ln C < 88. Beyond, one constant shift for all logits.
        self._shift = max(0.0, head.scale + math.log(head.num_classes) - _EXP_LIMIT)
        chunk_rows = min(_CHUNK_ROWS, gathered.shape[0])
        self._buffers = [gathered.new_empty(chunk_rows, anchor.unit.shape[0]) for anchor in anchors]
        self.target_cosine = gathered.new_zeros((), dtype=torch.float64)  # mean over the batch of cos(f, w_y)
        if with_gradients:
            self.grad_samples = torch.zeros_like(gathered)  # [B, D] with respect to the unit embeddings, from this rank's centers
            self.grad_centers = torch.zeros_like(anchors[0].unit)  # [S, D] of the mean loss

    def run(self) -> Tensor:
        """The mean loss; the other results are attributes."""
        loss = self._x.new_zeros((), dtype=torch.float64)
        for start in range(0, self._x.shape[0], _CHUNK_ROWS):
            loss += self._chunk(slice(start, min(start + _CHUNK_ROWS, self._x.shape[0])))
        if self._with_gradients:
            learned = self._anchors[0]
            self.grad_centers = _normalize_backward(self.grad_centers, learned.unit, learned.norm)
        self.target_cosine /= self._x.shape[0]
        return (loss / self._x.shape[0]).float()

    def _chunk(self, rows: slice) -> Tensor:
        """Sum of the losses of ``rows``; adds their gradients. [rows] vectors are float64: they cost nothing, and s multiplies errors."""
        terms = [self._score(rows, anchor, buffer) for anchor, buffer in zip(self._anchors, self._buffers, strict=True)]
        over_ranks = torch.stack([term.partial for term in terms])
        self._head._ranks.sum(over_ranks)
        negatives, cosine, held = over_ranks.double().unbind(1)  # [anchors, rows] each
        target_logit = self._head.scale * unified_margin(cosine, self._head.margin)
        log_ratio = negatives.log() + self._shift - target_logit  # a and b
        log_ratio[held == 0.0] = -math.inf  # a sample whose class has no such anchor has no such term
        loss = torch.logsumexp(torch.cat([torch.zeros_like(log_ratio[:1]), log_ratio]), 0)
        self.target_cosine += cosine[0].sum()
        if self._with_gradients:
            slope = margin_slope(cosine, self._head.margin, self._head.margin_gradient)
            # dL/d(s cos_j) = exp(s cos_j - z_y - L): the buffer times one factor a row
            factor = torch.exp(self._shift - target_logit - loss)
            factor[(held == 0.0) | (negatives == 0.0)] = 0.0
            factor *= self._head.scale / self._x.shape[0]
            for anchor, term, on_target, row_factor in zip(self._anchors, terms, -negatives * slope, factor, strict=True):
                self._add_gradients(rows, anchor, term, on_target.float(), row_factor.float().unsqueeze(1))
        return loss.sum()

    def _score(self, rows: slice, anchor: _Anchor, buffer: Tensor) -> _Term:
        x, columns = self._x[rows], anchor.columns[rows]
        exps = torch.mm(x * self._head.scale, anchor.unit.T, out=buffer[: x.shape[0]])
        own = (columns >= 0).nonzero().squeeze(1)
        column = columns[own]
        if self._shift:
            exps.sub_(self._shift)
        exps.exp_()
        exps[own, column] = 0.0
        partial = x.new_zeros(3, x.shape[0])
        partial[0] = exps.sum(1)
        partial[1, own] = (x[own] * anchor.unit[column]).sum(1)
        partial[2, own] = 1.0
        return _Term(exps, own, column, partial)

    def _add_gradients(self, rows: slice, anchor: _Anchor, term: _Term, on_target: Tensor, factor: Tensor) -> None:
        """``term.exps`` with ``on_target`` [rows] in its target entries, times ``factor`` [rows, 1], is dL/dcos."""
        term.exps[term.own, term.column] = on_target[term.own]
        self.grad_samples[rows].add_(torch.mm(term.exps, anchor.unit).mul_(factor))
        if anchor.norm is not None:
            self.grad_centers.addmm_(term.exps.T, self._x[rows] * factor)


@dataclass(frozen=True)
class _Term:
    """What one rank knows of one anchor's term of a chunk."""

    exps: Tensor  # [rows, S] exp(s cos - shift) of the negatives, 0 at the targets; a view of the reused buffer
    own: Tensor  # [n] rows whose class this rank holds
    column: Tensor  # [n] their column
    partial: Tensor  # [3, rows] to be summed over ranks: sum of exps, target cosine, 1 where the target is held


def _normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of x [n, D] and their norms [n, 1], clamped to 1e-12."""
    norm = x.norm(dim=1, keepdim=True).clamp_min_(1e-12)
    return x / norm, norm


def _normalize_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of x from the gradient of its unit rows. All [n, D] but norm [n, 1]."""
    return (grad - unit * (grad * unit).sum(1, keepdim=True)) / norm
