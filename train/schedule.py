"""The learning rate as a pure function of what has been trained: nothing to save, nothing to restore."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import ScheduleConfig


@dataclass(frozen=True)
class Curve:
    """Linear warm-up to ``lr``, then decay to ``final_lr``. Lengths are in images: stages of different batches can share a curve."""

    lr: float
    warmup: int  # images; at most length
    length: int  # images of the whole curve, warm-up included
    power: float  # of the decay; 1 is linear
    final_lr: float

    def at(self, done: int, batch: int) -> float:
        """Learning rate of the optimizer step on the images [done, done + batch) of the curve.

        In the warm-up ``lr (done + batch) / warmup``: the first step uses a share of lr, not 0, and the last one uses lr. Then
        ``final_lr + (lr - final_lr) (1 - progress)^power``, progress = (done - warmup) / (length - warmup): the first step after the
        warm-up uses lr again; final_lr is reached at ``length``, where the first step is that is not taken, and held from there on.
        """
        if done < 0 or batch < 1:
            raise ValueError(f"need done >= 0 and batch >= 1, got {done=}, {batch=}")
        if done < self.warmup:
            return self.lr * min(1.0, (done + batch) / self.warmup)
        if done >= self.length:
            return self.final_lr
        progress = (done - self.warmup) / (self.length - self.warmup)
        return self.final_lr + (self.lr - self.final_lr) * (1 - progress) ** self.power


def build_curve(config: ScheduleConfig, lr: float, *, batch: int, steps_per_epoch: int, length: int) -> Curve:
    """The curve of a recipe.

    Args:
        lr: where the warm-up leads.
        batch, steps_per_epoch: images per optimizer step, and optimizer steps per epoch, where the warm-up is.
        length: images of the whole curve.
    Raises: ValueError if the warm-up is longer than the curve.
    """
    steps = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_epochs * steps_per_epoch)
    if steps * batch > length:
        raise ValueError(f"a warm-up of {steps} steps of {batch} images is longer than the {length} images that it is part of")
    return Curve(lr, steps * batch, length, config.power if config.decay == "polynomial" else 1.0, config.final_lr)
