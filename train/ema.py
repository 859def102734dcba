"""An exponential mean of the backbone's weights over the steps of a run: less noise than the last weights, for evaluation and release.

    d   = min(decay, (1 + n) / (10 + n))      n: updates before this one
    ema = d ema + (1 - d) w                   after every step that was applied

The bound on d is the usual warm-up (TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``): without it a run of fewer than
1 / (1 - decay) steps would end near its initial weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from train.engine_state import local_masters


class BackboneEma:
    """The mean of this rank's part of the backbone: its ZeRO partition of the float32 master weights, and its BatchNorm statistics.

    Memory: one more float32 per master weight and rank, on the device of the masters. No method communicates. The mean is float32 too:
    a weight that stays within 2^-24 / (1 - decay) of its mean (relative; 6e-4 at 0.9999) no longer moves it.
    """

    def __init__(self, engine, decay: float) -> None:
        """Start from the engine's present weights.

        Args:
            engine: a DeepSpeedEngine of ZeRO 1, 2 or 3, whatever its precision. With ``offload_optimizer`` masters and mean are on the CPU.
            decay: weight of the past in [0, 1), once the warm-up is over.
        Raises: ConfigError if the masters are not in memory as float32.
        """
        self._engine, self.decay, self.updates = engine, decay, 0
        self.means = [master.detach().clone() for master in local_masters(engine)]
        self._buffers = {name: buffer.clone() for name, buffer in _float_buffers(engine.module).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards the present weights; to be called after a step that was applied. Does not wait for the device."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, value in self._pairs():
            mean.lerp_(value, 1 - decay)
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of this rank's mean besides ``means``, which lie as the masters do; tensors are not copied."""
        return {"updates": self.updates, "buffers": self._buffers}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        self.updates = state["updates"]
        for name, mean in self._buffers.items():
            mean.copy_(state["buffers"][name])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(mean, present value) of every tensor. DeepSpeed is asked each time: it may put a master's data elsewhere."""
        yield from zip(self.means, local_masters(self._engine), strict=True)
        buffers = _float_buffers(self._engine.module)
        yield from ((mean, buffers[name]) for name, mean in self._buffers.items())


def _float_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
