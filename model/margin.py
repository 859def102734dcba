"""Margins on the target logit."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MarginGradient = Literal["exact", "straight_through"]
MARGIN_GRADIENTS = ("exact", "straight_through")


def unified_margin(cosine: Tensor, margin: tuple[float, float, float]) -> Tensor:
    """Target cosine under the unified margin, before the scale: ``cos(m1 theta + m2) - m3``.

    SphereFace (m1 > 1), ArcFace (m2 > 0; arXiv:1801.07698, Eq. 4 has all three) and CosFace (m3 > 0). Where ``m1 theta + m2`` would pass
    pi, the cosine part goes on as ``cos(theta) - cos(theta_pi) - 1`` with ``m1 theta_pi + m2 = pi``: it joins without a jump, keeps
    falling with theta (no fold-back) and keeps slope 1 in the cosine, so the hardest samples still get a gradient. The field's ArcFace
    continues with slope 1 as well, but jumps there from -1 to ``-cos(m2) - m2 sin(m2)``.

    Args:
        cosine: any shape, floating; values outside [-1, 1] by round-off are clamped.
        margin: (m1, m2, m3): factor on the angle, radians, cosine.
    Returns: the same shape and dtype, differentiable in ``cosine`` except at theta = 0 and theta = theta_pi.
    """
    m1, m2, m3 = margin
    if m1 == 1.0 and m2 == 0.0:
        return cosine - m3
    theta = torch.acos(_inside(cosine))
    return torch.where(m1 * theta + m2 <= math.pi, torch.cos(m1 * theta + m2), cosine - _cosine_at_pi(m1, m2) - 1.0) - m3


def margin_slope(cosine: Tensor, margin: tuple[float, float, float], gradient: MarginGradient) -> Tensor:
    """d(target cosine under the margin) / d(cosine), same shape as ``cosine``.

    ``exact`` is the true derivative ``m1 sin(m1 theta + m2) / sin(theta)``; it grows without bound as theta -> 0 and is capped only by
    the clamp of the cosine to the open interval (-1, 1). ``straight_through`` is 1: what the field's published numbers were trained with.
    """
    m1, m2, _ = margin
    if gradient == "straight_through" or (m1 == 1.0 and m2 == 0.0):
        return torch.ones_like(cosine)
    inside = _inside(cosine)
    angle = m1 * torch.acos(inside) + m2
    slope = m1 * torch.sin(angle) / torch.sqrt((1.0 - inside) * (1.0 + inside))
    return torch.where(angle <= math.pi, slope, 1.0)


def curricular_negatives(cosine: Tensor, target: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Negatives of CurricularFace (arXiv:2004.00288, Eq. 5 and 6): hard ones, ``cos_j > target``, become ``cos_j (t + cos_j)``.

    Args:
        cosine: [n, S] of the negatives.
        target: [n, 1] target cosine under the margin.
        t: scalar, from :func:`curricular_t`.
    Returns: (modulated cosine, its derivative in ``cosine``: ``t + 2 cos_j`` where hard, else 1), both [n, S]. No gradient reaches ``t``.
    """
    hard = cosine > target
    return torch.where(hard, cosine * (t + cosine), cosine), torch.where(hard, t + 2.0 * cosine, 1.0)


def curricular_t(t: Tensor, mean_target_cosine: Tensor) -> Tensor:
    """The next t (arXiv:2004.00288, Eq. 7): ``0.01 mean(cos_y) + 0.99 t`` over the global batch, before its loss; t_0 = 0.

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


def _cosine_at_pi(m1: float, m2: float) -> float:
    return math.cos((math.pi - m2) / m1)
