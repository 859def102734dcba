"""Margins on the target logit."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MarginGradient = Literal["exact", "straight_through"]
MARGIN_GRADIENTS = ("exact", "straight_through")
Margin = tuple[float, float | Tensor, float | Tensor]  # (m1, m2, m3): factor on the angle, radians, cosine; a tensor has one a sample


def unified_margin(cosine: Tensor, margin: Margin) -> Tensor:
    """Target cosine under the unified margin, before the scale: ``cos(m1 theta + m2) - m3``.

    SphereFace (m1 > 1), ArcFace (m2 > 0; arXiv:1801.07698, Eq. 4 has all three) and CosFace (m3 > 0). Where ``m1 theta + m2`` would pass
    pi, the cosine part goes on as ``cos(theta) - cos(theta_pi) - 1`` with ``m1 theta_pi + m2 = pi``: it joins without a jump, keeps
    falling with theta (no fold-back) and keeps slope 1 in the cosine, so the hardest samples still get a gradient. The field's ArcFace
    continues with slope 1 as well, but jumps there from -1 to ``-cos(m2) - m2 sin(m2)``. Where a negative m2 (AdaFace) takes the angle
    below 0, the cosine part stays at 1 and its slope is 0: so near its class center a sample of high quality is not pulled any closer.

    Args:
        cosine: any shape, floating; round-off beyond [-1, 1] does no harm.
        margin: tensors in it have the shape of ``cosine``.
    Returns: the shape and dtype of ``cosine``, differentiable in it and in m2 and m3, except where two pieces join and at theta = 0 and
        theta = pi, where the cosine is clamped.
    """
    m1, m2, m3 = margin
    if _is_cosine_alone(m1, m2):
        return cosine - m3
    angle = m1 * torch.acos(_inside(cosine)) + m2
    beyond = cosine - _cos((math.pi - m2) / m1) - 1.0
    return torch.where(angle <= math.pi, torch.cos(angle.clamp(min=0.0)), beyond) - m3


def margin_slope(cosine: Tensor, margin: Margin, gradient: MarginGradient) -> Tensor:
    """d(target cosine under the margin) / d(cosine), same shape as ``cosine``.

    ``exact`` is the true derivative ``m1 sin(m1 theta + m2) / sin(theta)``; it grows without bound as theta -> 0 and is capped only by
    the clamp of the cosine to the open interval (-1, 1), beyond which it stays what it is there. ``straight_through`` is 1: what the
    field's published numbers were trained with.
    """
    m1, m2, _ = margin
    if gradient == "straight_through" or _is_cosine_alone(m1, m2):
        return torch.ones_like(cosine)
    inside = _inside(cosine)
    angle = m1 * torch.acos(inside) + m2
    slope = m1 * torch.sin(angle.clamp(min=0.0)) / torch.sqrt((1.0 - inside) * (1.0 + inside))
    return torch.where(angle <= math.pi, slope, 1.0)


def margin_slope_in_m2(cosine: Tensor, margin: Margin) -> Tensor:
    """d(target cosine under the margin) / d(m2), same shape as ``cosine``.

    ``-sin(m1 theta + m2)``; 0 where the angle is below 0; past pi ``-sin((pi - m2) / m1) / m1``, at most 1 in size as everywhere.
    """
    m1, m2, _ = margin
    angle = m1 * torch.acos(_inside(cosine)) + m2
    return torch.where(angle <= math.pi, -torch.sin(angle.clamp(min=0.0)), -_sin((math.pi - m2) / m1) / m1)


def curricular_negatives(cosine: Tensor, target: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Negatives of CurricularFace, arXiv:2004.00288, Sec. 3.2 (its N(t, cos theta_j)).

    Hard ones, ``cos_j > target``, become ``cos_j (t + cos_j)``: less than they were while ``t + cos_j < 1``, early in training, and more
    later on.

    Args:
        cosine: [n, S] of the negatives.
        target: [n, 1] target cosine under the margin. The published code compares with ``cos(theta + m)`` past pi as well, where it rises.
        t: scalar, from :func:`curricular_t`.
    Returns: (modulated cosine, its derivative in ``cosine``: ``t + 2 cos_j`` where hard, the paper's M, else 1), both [n, S]. t and target
        count as constants.
    """
    hard = cosine > target
    return torch.where(hard, cosine * (t + cosine), cosine), torch.where(hard, t + 2.0 * cosine, 1.0)


def curricular_t(t: Tensor, mean_target_cosine: Tensor) -> Tensor:
    """The next t: ``0.01 mean(cos_y) + 0.99 t`` over the global batch, before its loss; t_0 = 0.

    arXiv:2004.00288, Sec. 3.2, "Adaptive Estimation of t". Its momentum of 0.99 stands there at the new mean; the published code, like
    this, gives it to the past.

    A mean that is not finite (the step will be skipped) leaves t alone: an average would never recover from it.
    """
    return torch.where(mean_target_cosine.isfinite(), torch.lerp(t, mean_target_cosine.to(t.dtype), 0.01), t)


def check_margin(margin: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return ``margin`` as three floats; ValueError unless 1 <= m1 < inf, 0 <= m2 < pi and 0 <= m3 < inf."""
    m1, m2, m3 = (float(m) for m in margin)
    if not (1.0 <= m1 < math.inf and 0.0 <= m2 < math.pi and 0.0 <= m3 < math.inf):
        raise ValueError(f"margin must satisfy m1 >= 1, 0 <= m2 < pi and m3 >= 0, got (m1, m2, m3) = {(m1, m2, m3)}")
    return m1, m2, m3


def _inside(cosine: Tensor) -> Tensor:
    edge = 1.0 - 1e-7  # theta = 4.5e-4 rad: bounds the exact slope at m1 * 2236, near a float32 sample's own error
    return cosine.clamp(-edge, edge)


def _is_cosine_alone(m1: float, m2: float | Tensor) -> bool:
    return m1 == 1.0 and not isinstance(m2, Tensor) and m2 == 0.0


def _cos(x: float | Tensor) -> float | Tensor:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def _sin(x: float | Tensor) -> float | Tensor:
    return torch.sin(x) if isinstance(x, Tensor) else math.sin(x)
