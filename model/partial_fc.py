"""Partial-FC: the class centers of one rank, their loss, their gradients and their optimizer. The mathematics: model.sharded_softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.anchor import Anchor, AnchorName, InjectedAnchor, LearnedAnchor, normalize, normalize_backward_
from model.class_shard import ClassShard, initial_centers, sample_centers, true_rows
from model.collectives import Collectives
from model.flops import head_flops
from model.kernels.products import Products
from model.margin import MARGIN_GRADIENTS, MarginGradient, check_margin, curricular_t
from model.micro_batch import Choice, Moving, Pending, Prepared, Union, no_gradient
from model.norm_margin import AdaFace, NormMargin, NormStatistics, SampleMargin, next_norm_statistics
from model.observation import Observation
from model.optimizer import CentersOptimizerKind, RowSparseAdamW, build_centers_optimizer, unite_rows
from model.prototypes import Expectation, LastEmbeddings
from model.sharded_softmax import Batch, Objective, ShardedSoftmax, Term
from model.unified_threshold import ShardedThreshold, initial_bias

Centers = Literal["learned", "pco", "pco_shared", "epl", "replace", "vpl"]
CENTERS: tuple[Centers, ...] = get_args(Centers)
Loss = Literal["softmax", "uniface"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
Margin = tuple[float, float, float] | NormMargin
# What of a head's state has a row a class.
ROW_STATE = frozenset(
    ("weight", "expectation", "expectation_seen", "last_embedding", "last_embedding_step", "exp_avg", "exp_avg_sq", "steps")
)
CHUNK_ROWS = {"cpu": 512, "cuda": 4096}  # by default, on a device of that type
_ROWS_AT_ONCE = 16384  # classes whose statistics are computed at a time
_W, _E = "learned", "expectation"
_TERMS: dict[Centers, tuple[Term, ...]] = {
    "learned": (Term(_W, _W),),
    "pco": (Term(_W, _W), Term(_E, _E)),
    "pco_shared": (Term(_W, _W), Term(_W, _E)),
    "epl": (Term(_W, _W), Term(_E, _E, detached=0.7)),
    "replace": (Term(_E, _E),),
    "vpl": (Term(_W, _W),),  # of another w: see _anchors
}


class PartialFC:
    """The class centers of one rank, their loss, gradients and optimizer.

    Not an ``nn.Module``: the DeepSpeed engine must neither shard, cast, average nor save it (it would keep rank 0's rows alone).

    Per optimizer step, call it once per micro-batch, backward each loss through the engine, then :meth:`step` if the engine's step was
    applied, else :meth:`discard`. The gradient of the centers is the mean over the micro-batches since then: no loss scale, no factor
    world_size, no all-reduce. If a gradient on any rank is not finite, ``backward`` hands ``inf`` to the engine on every rank, so that it
    skips the step everywhere.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        margin: Margin = (1.0, 0.5, 0.0),
        scale: float = 64.0,
        margin_gradient: MarginGradient = "exact",
        centers: Centers = "learned",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        *,
        curricular: bool = False,
        loss: Loss = "softmax",
        interclass_filter: float | None = None,
        product_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        optimizer: CentersOptimizerKind = "row_sparse",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """
        Args:
            embedding_size: D.
            num_classes: C over all ranks.
            sample_rate: share of the C centers scored per micro-batch, in (0, 1].
            margin: (m1, m2, m3): factor on the angle, radians, cosine, see :func:`model.margin.unified_margin`; or AdaFace or MagFace of
                :mod:`model.norm_margin`, which follow the embedding's norm.
            scale: s of the logits, positive.
            margin_gradient: ``exact`` or ``straight_through``; see :func:`model.margin.margin_slope`.
            centers: see :meth:`set_stage`.
            group: process group that shares the classes; None: the default group, or one process that owns every class.
            seed: of the initial centers and of the sampling.
            curricular: hard negatives as in CurricularFace; see :func:`model.margin.curricular_negatives`. Takes a second chunk buffer.
                (So do, under bfloat16 products, a filter, UniFace, and scales beyond 60 or so, whose logits are shifted.)
            loss: ``softmax`` over the scored classes, or ``uniface``: every class against one learned threshold
                (:mod:`model.unified_threshold`), in the centers modes of one term.
            interclass_filter: leave out the negatives above this cosine, which may be a wrong label's true class; None: keep all. (The
                field's filter sets their cosine to 0 instead, so that each still counts as a negative at right angles.) Under bfloat16
                products a cosine within 0.4 % of the limit may fall on either side.
            product_dtype: of the operands of matrix products, float32 or bfloat16; sums and results are float32. None: bfloat16 on CUDA,
                float32 on a CPU.
            chunk_rows: samples of the global micro-batch that share the buffer at a time: more memory, fewer passes over the centers and
                fewer launches. None: 512 on a CPU, 4096 on CUDA.
            optimizer: ``row_sparse`` touches sampled rows only; ``dense`` is the field's AdamW over all rows.
            betas, eps: of AdamW.
            device: of the centers; None: the current GPU under an nccl group, else torch's default device.
            waiting: entered around every wait for a transfer, to time it.

        Raises:
            ValueError: an argument outside its range.
        """
        if margin_gradient not in MARGIN_GRADIENTS:
            raise ValueError(f"margin_gradient must be one of {', '.join(MARGIN_GRADIENTS)}, got {margin_gradient!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive, got {scale}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if interclass_filter is not None and not 0.0 < interclass_filter < 1.0:
            raise ValueError(f"interclass_filter must lie in (0, 1), got {interclass_filter}")
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if device is None:
            nccl = group is not None and dist.get_backend(group) == "nccl"
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.get_default_device()
        device = torch.device(device)
        chunk_rows = CHUNK_ROWS[device.type] if chunk_rows is None else chunk_rows
        for name, value in {"num_classes": num_classes, "embedding_size": embedding_size, "chunk_rows": chunk_rows}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if product_dtype is None:
            product_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._ranks = Collectives(group, waiting)
        self._products = Products(product_dtype, device)
        self._chunk_rows = chunk_rows
        self.shard = ClassShard(num_classes, self._ranks.rank, self._ranks.world_size)
        self.scale, self.margin_gradient, self.loss, self.interclass_filter = float(scale), margin_gradient, loss, interclass_filter
        self._moving = Moving(torch.zeros((), device=device), NormStatistics.initial(device))
        self._bias = torch.full((1, 1), initial_bias(max(1.0, sample_rate * num_classes)), device=device)
        self._bias_optimizer = RowSparseAdamW(self._bias, betas, eps)
        self._weight = initial_centers(self.shard, embedding_size, seed).to(device)
        self._optimizer = build_centers_optimizer(optimizer, self._weight, betas, eps)
        self._expectation = Expectation(len(self.shard), embedding_size, device)
        self._last_embeddings: LastEmbeddings | None = None  # while the centers are vpl
        self._seed, self._draws, self._steps = seed, 0, 0
        self._prepared: Prepared | None = None
        self._pending = Pending()
        self.observation = Observation(device)
        self.observing = False  # whether micro-batches are observed for what costs time; equal on all ranks
        # Of the last global micro-batch, before the margin: mean cos_y, mean of its square, and mean cosine to the own expectation.
        self.target_cosine = self.target_cosine_square = self.expectation_cosine = torch.full((), math.nan, device=device)
        self.set_stage(sample_rate, centers, update_expectation=False, margin=margin, curricular=curricular)

    def set_stage(
        self,
        sample_rate: float,
        centers: Centers,
        update_expectation: bool,
        margin: Margin | None = None,
        curricular: bool | None = None,
    ) -> None:
        """Switch what the next forward scores and whether :meth:`step` moves the expectation.

        Args:
            sample_rate: as of the constructor.
            centers: ``learned`` scores against the class centers w; ``pco`` adds the expectations e as a second anchor inside one logarithm
                (LVFace, arXiv:2501.13420); ``pco_shared`` does too, but takes the negatives of the second term from w; ``epl`` is the mean
                of two separate losses (arXiv:2405.12447); ``replace`` scores against e alone, and w gets no gradient. A class without an
                expectation is no negative against e, and its samples have no such term. ``vpl`` scores against class centers that are drawn
                towards the last embedding of their class (CVPR 2021); it remembers one more matrix [c, D] as long as the stage lasts.
            update_expectation: whether e moves.
            margin, curricular: as of the constructor; None: as they are.

        Raises:
            ValueError: a value outside its range.
        """
        if not 0.0 < sample_rate <= 1.0:
            raise ValueError(f"sample_rate must lie in (0, 1], got {sample_rate}")
        if centers not in CENTERS:
            raise ValueError(f"centers must be one of {', '.join(CENTERS)}, got {centers!r}")
        margin = self.margin if margin is None else margin if isinstance(margin, NormMargin) else check_margin(margin)
        curricular = self.curricular if curricular is None else bool(curricular)
        if curricular and (isinstance(margin, NormMargin) or self.loss == "uniface"):
            raise ValueError("curricular needs a margin (m1, m2, m3) and loss softmax: set curricular to False, or change these")
        if self.loss == "uniface" and len(_TERMS[centers]) > 1:
            raise ValueError(f"loss uniface has one term; centers {centers!r} have two")
        self.sample_rate, self.centers, self.update_expectation = float(sample_rate), centers, bool(update_expectation)
        self.margin, self.curricular = margin, curricular
        if centers != "vpl":
            self._last_embeddings = None
        elif self._last_embeddings is None:
            self._last_embeddings = LastEmbeddings(*self._weight.shape, self._weight.device)
        self._prepared = None

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
    @torch.no_grad()
    def weight(self, rows: Tensor) -> None:
        if rows.shape != self._weight.shape:
            raise ValueError(f"centers of shape {tuple(rows.shape)} do not fit this rank's {tuple(self._weight.shape)}")
        self._weight.copy_(rows)

    @property
    def expectation(self) -> Tensor:
        """[c, D] float32: unit rows where :attr:`expectation_seen`, zero elsewhere."""
        return self._expectation.rows

    @property
    def expectation_seen(self) -> Tensor:
        """[c] bool: classes of which an embedding was averaged in."""
        return self._expectation.seen

    @property
    def expectation_updates(self) -> int:
        """How often an expectation of this rank's classes got a value since this process began; the host waits for the device."""
        return int(self._expectation.updates)

    def prepare(self, labels: Tensor) -> None:
        """Gather the labels of the coming micro-batch and choose the classes that it scores.

        The call on the same ``labels`` tensor does it if this was not called. Only this part waits for the device, to read a few numbers:
        called before the backbone's forward, it finds a GPU's queue empty, and the rest of the step never waits.

        Raises:
            ValueError: a label outside [0, C), on every rank.

        Collectives: one all-gather of [b] int64.
        """
        self._prepared = Prepared(labels, labels._version, self._choose(labels))

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of the global micro-batch.

        Args:
            embeddings: [b, D], any floating dtype, not normalised; the same b on every rank.
            labels: [b] int64 global classes.

        Returns: scalar float32, the mean over all B = b * world_size samples, equal on every rank. Its backward gives
            ``embeddings.grad = W * g * dL/dembeddings`` with g the gradient that arrives (loss scale and 1/accumulation included): the
            engine averages over the W ranks. Without gradients (``torch.no_grad``) it scores the set that the next training call would.

        Raises:
            ValueError: a label outside [0, C), on every rank; shapes that do not fit, on this rank.

        Collectives: those of :meth:`prepare` and of :mod:`model.sharded_softmax`; an all-gather of [b, D] float32, and of [b, 1] for a
            margin that follows norms; with gradients a reduce-scatter of [B, D] and an all-reduce of a flag.
        """
        if embeddings.shape != (labels.numel(), self.weight.shape[1]) or not labels.numel():
            expected = f"[b, {self.weight.shape[1]}] and [b], b > 0"
            raise ValueError(f"embeddings and labels must be {expected}, got {tuple(embeddings.shape)} and {tuple(labels.shape)}")
        prepared, self._prepared = self._prepared, None
        choice = prepared.choice if prepared and prepared.is_of(labels) else self._choose(labels)
        with_gradients = torch.is_grad_enabled() and embeddings.requires_grad
        if with_gradients:
            self._draws += 1
        with torch.autocast(self.weight.device.type, enabled=False):  # it would take products to a dtype that exp overflows
            return _Loss.apply(embeddings, self, choice, with_gradients)

    def _choose(self, labels: Tensor) -> Choice:
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        gathered = self._ranks.gather(labels.reshape(-1).to(torch.int64))()
        outside = (gathered < 0) | (gathered >= self.num_classes)
        if outside.any():
            position = int(outside.nonzero()[0])
            rank, sample = divmod(position, gathered.numel() // self._ranks.world_size)
            raise ValueError(f"label {int(gathered[position])} of sample {sample} on rank {rank} lies outside [0, {self.num_classes})")
        targets = self.shard.localize(gathered)
        rows = None
        if self.sample_rate < 1.0:
            rows = sample_centers(self.shard, gathered, self.sample_rate, self._seed, self._draws)
        with_expectation = rows
        if self.centers not in ("learned", "vpl") and not self.expectation_seen.all():
            with_expectation = true_rows(self.expectation_seen) if rows is None else rows[self.expectation_seen[rows]]
        owned = true_rows(targets >= 0) if self.update_expectation or self.centers == "vpl" else None
        pending, union = self._pending.gradient, None
        if rows is not None and pending is not None and pending[0] is not None:
            union = Union(pending[0], unite_rows(pending[0], rows))
        return Choice(targets, rows, with_expectation, owned, union)

    def _anchors(self, choice: Choice) -> dict[AnchorName, Anchor]:
        """What the terms of the loss name."""
        named = {name for term in _TERMS[self.centers] for name in (term.negatives, term.target)}
        anchors: dict[AnchorName, Anchor] = {}
        if _E in named:
            rows = choice.with_expectation
            anchors[_E] = Anchor(self.expectation, rows, _columns(choice.targets, rows), self._products)
        if _W in named:
            arguments = (self.weight, choice.rows, _columns(choice.targets, choice.rows), self._products)
            if self.centers == "vpl":
                anchors[_W] = InjectedAnchor(*arguments, self._last_embeddings.rows, self._last_embeddings.shares(self._steps))
            else:
                anchors[_W] = LearnedAnchor(*arguments)
        return anchors

    def _walker(self, anchors: dict[AnchorName, Anchor]) -> ShardedSoftmax:
        objective = Objective(
            _TERMS[self.centers],
            self.centers != "epl",
            self.scale,
            self.margin_gradient,
            self.curricular,
            self.interclass_filter,
        )
        arguments = (anchors, objective, self.num_classes, self._chunk_rows, self._ranks)
        return ShardedThreshold(self._bias, *arguments) if self.loss == "uniface" else ShardedSoftmax(*arguments)

    def pending_gradient(self) -> tuple[Tensor, Tensor]:
        """(sorted local rows [S] int64, dL/dw of those rows [S, D] float32): the mean over the micro-batches since the last step."""
        rows, grad = self._pending.mean_gradient(self.weight)
        return torch.arange(len(self.shard), device=grad.device) if rows is None else rows, grad.clone()

    def not_finite_ranks(self) -> list[int]:
        """Ranks to blame, in order, if a value of the micro-batches since the last step was not finite; the host waits for the device.

        Those whose own embeddings or scored class centers were not finite, or if there are none (an expectation was not, or a sum
        overflowed), those whose gradients were not. Collectives: a gather of [1, 3] uint8.
        """
        mine = self._pending.not_finite
        mine = torch.zeros(3, dtype=torch.bool, device=self.weight.device) if mine is None else mine
        every = self._ranks.gather(mine.unsqueeze(0).to(torch.uint8))().bool().cpu()
        blamed = every[:, 0] if every[:, 0].any() else every.any(1)
        return blamed.nonzero().flatten().tolist()

    def flops(self, images: int) -> float:
        """Floating-point operations of this rank for a global micro-batch of ``images``, see :mod:`model.flops`; mean over samplings."""
        negatives = {term.negatives for term in _TERMS[self.centers]}
        scored = self.sample_rate * len(self.shard)
        return head_flops(images, scored, self.weight.shape[1], terms=len(negatives), trained_terms=int(_W in negatives))

    def gradient_norm(self) -> Tensor:
        """L2 norm of the pending gradient over all ranks, scalar float64. Collectives: one all-reduce of a float64."""
        grad = self._pending.mean_gradient(self.weight)[1]
        return self._ranks.sum(torch.linalg.vector_norm(grad, dtype=torch.float64).square())().sqrt()

    def step(self, lr: float, weight_decay: float) -> None:
        """Apply the pending gradient to the centers and, if the stage says so, the pending samples to the expectation."""
        self._optimizer.step(*self._pending.mean_gradient(self.weight), lr=lr, weight_decay=weight_decay)
        if self._pending.bias is not None:
            self._bias_optimizer.step(None, self._pending.mean_bias_gradient(), lr=lr, weight_decay=0.0)
        self._expectation.drift.zero_()
        if self._pending.targets:
            targets, samples = torch.cat(self._pending.targets), torch.cat(self._pending.samples)
            if self.update_expectation:
                self._expectation.update(targets, samples)
            if self.centers == "vpl":
                self._last_embeddings.update(targets, samples, self._steps)
        if self._pending.moving is not None:
            self._moving = self._pending.moving
        self._steps += 1
        self.discard()

    def discard(self) -> None:
        """Drop all that the micro-batches since the last step left: the step was skipped."""
        self._pending = Pending()
        self._prepared = None  # the expectations may have moved

    def _move(self, mean_cosine: Tensor, norms: Tensor | None) -> tuple[Moving, SampleMargin]:
        """The running values after a micro-batch, and its margin. ``norms``: [B] float64, where the margin asks for them."""
        now = self._moving if self._pending.moving is None else self._pending.moving
        if self.curricular:
            now = replace(now, t=curricular_t(now.t, mean_cosine))
        if norms is None:
            return now, SampleMargin(self.margin)
        if isinstance(self.margin, AdaFace):
            now = replace(now, norms=next_norm_statistics(now.norms, norms))
        return now, self.margin.of(norms, now.norms)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """How the class centers and expectations of all ranks do, for a log; the host waits for the device. NaN: no meaning.

        ``center_norm``: mean L2 norm of the class centers; ``expectation_classes``: classes that have an expectation;
        ``center_expectation_cosine``: mean over them of cos(w_j, e_j); ``expectation_drift``: mean of 1 - cos over the expectations that
        the last applied step moved; ``expectation_cosine``: mean cosine of the last micro-batch to its own expectations; ``curricular_t``,
        ``uniface_bias``, ``norm_mean`` and ``norm_std``: state of these losses.

        Collectives: one all-reduce of [5] float64.
        """
        seen = self.expectation_seen
        own = torch.zeros(5, dtype=torch.float64, device=self.weight.device)
        own[0] = seen.sum()
        for weight, expectation in zip(self.weight.split(_ROWS_AT_ONCE), self.expectation.split(_ROWS_AT_ONCE), strict=True):
            own[1] += F.cosine_similarity(weight, expectation).sum()  # e is 0 where it is not seen
            own[2] += torch.linalg.vector_norm(weight, dim=1).sum()
        own[3:] = self._expectation.drift
        classes, cosines, norms, drift, moved = self._ranks.sum(own)().tolist()
        adaptive = isinstance(self.margin, AdaFace)
        return {
            "center_norm": norms / self.num_classes,
            "expectation_classes": classes,
            "center_expectation_cosine": cosines / classes if classes else math.nan,
            "expectation_drift": drift / moved if moved else math.nan,
            "expectation_cosine": float(self.expectation_cosine),
            "curricular_t": float(self._moving.t) if self.curricular else math.nan,
            "uniface_bias": float(self._bias) if self.loss == "uniface" else math.nan,
            "norm_mean": float(self._moving.norms.mean) if adaptive else math.nan,
            "norm_std": float(self._moving.norms.std) if adaptive else math.nan,
        }

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this rank's rows ``[class_start, class_start + c)``; tensors are not copied.

        Those named in ``ROW_STATE`` have a row a class; the others are equal on all ranks.
        """
        rows = {"weight": self.weight, "expectation": self.expectation, "expectation_seen": self.expectation_seen}
        if self._last_embeddings is not None:
            rows |= {"last_embedding": self._last_embeddings.rows, "last_embedding_step": self._last_embeddings.written}
        return {**rows, **self._optimizer.state(), **self.replicated_state()}

    def replicated_state(self) -> dict[str, Tensor]:
        """The part of :meth:`state` that has no row a class, and is equal on all ranks."""
        bias = {f"bias_{name}": tensor for name, tensor in self._bias_optimizer.state().items()}
        counts = {"draws": torch.tensor(self._draws), "applied_steps": torch.tensor(self._steps)}
        return {"bias": self._bias, **bias, **counts, **self._moving.state()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over :meth:`state` of the same rows; ValueError, with nothing changed, if something is missing or of another size."""
        expected = {name: tensor.shape for name, tensor in self.state().items() if not name.startswith("last_embedding")}
        if "last_embedding" in state or "last_embedding_step" in state:
            expected |= {"last_embedding": self.weight.shape, "last_embedding_step": self.weight.shape[:1]}
        if missing := expected.keys() - state.keys():
            raise ValueError(f"the state of a head lacks {', '.join(sorted(missing))}: it is of another version, stage or optimizer")
        if other := [name for name, shape in expected.items() if state[name].shape != shape]:
            pairs = ", ".join(f"{name} {tuple(state[name].shape)}, here {tuple(expected[name])}" for name in other)
            raise ValueError(f"the state of a head is of other sizes: {pairs}")
        self.weight = state["weight"]
        self.expectation.copy_(state["expectation"])
        self.expectation_seen.copy_(state["expectation_seen"])
        self._last_embeddings = None
        if "last_embedding" in state or self.centers == "vpl":  # the one where a stage has just ended, the other where none of it was seen
            self._last_embeddings = LastEmbeddings(*self._weight.shape, self._weight.device)
        if "last_embedding" in state:
            self._last_embeddings.rows.copy_(state["last_embedding"])
            self._last_embeddings.written.copy_(state["last_embedding_step"])
        self._optimizer.load_state(state)
        self._bias.copy_(state["bias"])
        self._bias_optimizer.load_state({name: state[f"bias_{name}"] for name in self._bias_optimizer.state()})
        self._draws, self._steps = int(state["draws"]), int(state["applied_steps"])
        self._moving = Moving.from_state(state, self._weight.device)
        self.discard()


class _Loss(torch.autograd.Function):
    """Loss and both gradients in forward; backward only hands them on, so that nothing of the chunks outlives them."""

    @staticmethod
    def forward(ctx, embeddings: Tensor, head: PartialFC, choice: Choice, with_gradients: bool) -> Tensor:
        unit, norm = normalize(embeddings.detach().float())
        gathering = head._ranks.gather(unit)
        gathering_norms = head._ranks.gather(norm) if isinstance(head.margin, NormMargin) else None
        anchors = head._anchors(choice)
        walker = head._walker(anchors)  # normalises the class centers meanwhile
        samples = gathering()
        cosines = walker.target_cosines(samples)
        own = cosines[_E if head.centers == "replace" else _W]
        head.target_cosine, head.target_cosine_square = own.mean().float(), own.mean_square().float()
        head.expectation_cosine = cosines[_E].mean().float() if _E in cosines else torch.full_like(head.target_cosine, math.nan)
        moving, margin = head._move(own.mean(), None if gathering_norms is None else gathering_norms().squeeze(1).double())
        observing = head.observing and with_gradients
        walked = walker.walk(Batch(samples, cosines, margin, moving.t if head.curricular else None), with_gradients, observing)
        if observing:
            head.observation.note_classes(choice.targets, len(head.shard) if choice.rows is None else len(choice.rows))
            head.observation.hardest_negative = walked.hardest_negatives.double().mean()
        if with_gradients:
            mine = slice(head._ranks.rank * len(unit), (head._ranks.rank + 1) * len(unit))
            head.observation.note_cosines(own.cosine[mine], own.held[mine])
            head._pending.moving = moving
            scattering = head._ranks.scatter_sum(walked.grad_samples)
            if walked.grad_centers is None:
                ctx.gradient, ctx.union = no_gradient(head.weight), None
            else:
                ctx.gradient, ctx.union = (choice.rows, anchors[_W].backward_(walked.grad_centers)), choice.union
            feature_grad = normalize_backward_(scattering(), lambda block: unit[block], norm)
            if walked.grad_norms is not None:
                mine = walked.grad_norms.view(head._ranks.world_size, -1)[head._ranks.rank]
                feature_grad.addcmul_(unit, mine.float().unsqueeze(1))
            # A sum is finite only if every summand is. One of finite gradients that overflows float32 is no better.
            of_input = norm.sum() + (anchors[_W].norm.sum() if _W in anchors else 0.0)
            not_finite = ~torch.stack([of_input, feature_grad.sum(), ctx.gradient[1].sum()]).isfinite()
            ctx.any_not_finite = head._ranks.sum(not_finite.any().float())
            head._pending.note_not_finite(not_finite)
            ctx.owned = None if choice.owned is None else (choice.targets[choice.owned], samples[choice.owned])
            ctx.head, ctx.dtype, ctx.feature_grad, ctx.grad_bias = head, embeddings.dtype, feature_grad, walked.grad_bias
        return walked.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        head, grad = ctx.head, ctx.feature_grad
        if grad is None:
            raise RuntimeError("this loss has been through backward already: its gradients were handed on, and are gone")
        head._pending.add(ctx.gradient, ctx.union)
        if ctx.owned:
            head._pending.targets.append(ctx.owned[0])
            head._pending.samples.append(ctx.owned[1])
        if ctx.grad_bias is not None:
            bias = ctx.grad_bias.float().view(1, 1)
            head._pending.bias = bias if head._pending.bias is None else head._pending.bias + bias
        grad.mul_(grad_loss * head._ranks.world_size).masked_fill_(ctx.any_not_finite() > 0, math.inf)
        ctx.feature_grad = ctx.gradient = ctx.owned = ctx.grad_bias = None
        return grad.to(ctx.dtype), None, None, None


def _columns(targets: Tensor, rows: Tensor | None) -> Tensor:
    """Where each target stands in the sorted ``rows`` (None: all rows); -1 if it does not."""
    if rows is None:
        return targets
    if rows.numel() == 0:
        return torch.full_like(targets, -1)
    position = torch.searchsorted(rows, targets).clamp_(max=rows.numel() - 1)
    return torch.where(rows[position] == targets, position, -1)
