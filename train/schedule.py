"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from typing import Literal


def learning_rate(
    step: int,
    *,
    base_lr: float,
    warmup_steps: int,
    total_steps: int,
    decay: Literal["linear", "polynomial"],
    power: float,
    final_lr: float,
) -> float:
    """Learning rate of optimizer step ``step``; 0 is the first.

    Warm-up, step < warmup_steps: ``base_lr (step + 1) / warmup_steps``, so the first step uses base_lr / warmup_steps, not 0, and the last
    one of the warm-up uses base_lr.
    Then: ``final_lr + (base_lr - final_lr) (1 - progress)^p``, progress = (step - warmup_steps) / (total_steps - warmup_steps), p = 1 for
    linear and ``power`` for polynomial. Step ``warmup_steps`` uses base_lr again; final_lr is reached at total_steps, the first step that
    is not taken, and held from there on.

    Args:
        total_steps: optimizer steps of the whole run, warm-up included; at least warmup_steps.
    Raises: ValueError when step or warmup_steps is negative, or total_steps < warmup_steps.
    """
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"need step >= 0 and 0 <= warmup_steps <= total_steps, got {step=}, {warmup_steps=}, {total_steps=}")
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    if step >= total_steps:
        return final_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + (base_lr - final_lr) * (1 - progress) ** (power if decay == "polynomial" else 1)
