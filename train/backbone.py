"""The backbone's part in a step: trained by DeepSpeed's engine, or frozen while the head alone learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.collectives import Collectives
from train.ema import BackboneEma


class TrainedBackbone:
    """The engine in training mode, and the mean of its weights."""

    def __init__(self, engine, ema: BackboneEma | None) -> None:
        """``engine``: a DeepSpeedEngine; ``ema``: None where no mean is kept."""
        self._engine, self._ema = engine, ema
        _set_mode(engine, training=True)

    def __call__(self, images: Tensor) -> Tensor:
        """[b, 3, 112, 112] -> [b, D] float32."""
        return self._engine(images)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    @property
    def ends_step(self) -> bool:
        """Whether this micro-batch is the step's last."""
        return self._engine.is_gradient_accumulation_boundary()

    def step(self) -> None:
        """To be called after each backward; acts on the last micro-batch only."""
        self._engine.step()

    def was_step_applied(self) -> bool:
        """Once after the last micro-batch: False if a gradient was not finite on some rank, equal on all ranks."""
        return self._engine.was_step_applied()

    def update_mean(self) -> None:
        """After a step that was applied."""
        if self._ema:
            self._ema.update()

    def gradient_norm(self) -> float:
        """Of the last step, if that was applied, over all ranks and before clipping; the host waits for the device."""
        return float(self._engine.get_global_grad_norm())


class FrozenBackbone:
    """The engine in evaluation mode, without gradients: BatchNorm uses its running statistics, and no patch or path is dropped.

    Neither ``engine.backward`` nor ``engine.step`` is called, so that nothing of the backbone changes: weights, running statistics,
    AdamW's moments and its count of steps (whose bias correction begins with the first step that trains), fp16's loss scale, and the mean
    of the weights. A step of zero gradients would still decay the weights and fade the moments. DeepSpeed's own count of steps
    (``engine.global_steps``) is of those that it takes, too.
    """

    def __init__(self, engine, ranks: Collectives, grad_accum_steps: int = 1) -> None:
        """``grad_accum_steps``: micro-batches of a step."""
        self._engine, self._ranks, self._grad_accum_steps = engine, ranks, grad_accum_steps
        self._embeddings: list[Tensor] = []  # [b, D] of each micro-batch of the step; leaves, whose gradients say whether all was finite
        _set_mode(engine, training=False)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """[b, 3, 112, 112] -> [b, D] float32. Collectives: under ZeRO 3 gathers of the weights."""
        return self._engine(images)

    def __call__(self, images: Tensor) -> Tensor:
        """:meth:`embed`, with the gradient that makes the head compute its own."""
        self._embeddings.append(self.embed(images).requires_grad_())
        return self._embeddings[-1]

    def backward(self, loss: Tensor) -> None:
        """To the head's gradients, and no further."""
        loss.backward()

    @property
    def ends_step(self) -> bool:
        """See TrainedBackbone."""
        return len(self._embeddings) == self._grad_accum_steps

    def step(self) -> None:
        """Nothing to do."""

    def was_step_applied(self) -> bool:
        """See TrainedBackbone: whether the head may step. The host waits for the device. Collectives: an all-reduce of a float32."""
        finite = torch.stack([embeddings.grad.isfinite().all() for embeddings in self._embeddings])
        self._embeddings = []
        return not float(self._ranks.sum((~finite.all()).float())())

    def update_mean(self) -> None:
        """The mean stays too."""

    def gradient_norm(self) -> float:
        """NaN: there is no gradient."""
        return math.nan


def _set_mode(engine, *, training: bool) -> None:
    """Of the engine and its module. DeepSpeed's own ``train`` and ``eval`` set the module's alone, and who evaluates in between
    (eval.embedder) restores what the engine says."""
    nn.Module.train(engine, training)
