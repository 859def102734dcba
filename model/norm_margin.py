"""Margins that follow the norm of the embedding, as a measure of the image's quality: AdaFace and MagFace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.margin import Margin


@dataclass(frozen=True)
class NormStatistics:
    """Running mean and standard deviation of the embeddings' norms, scalars."""

    mean: Tensor
    std: Tensor

    @classmethod
    def initial(cls, device: torch.device) -> NormStatistics:
        """Where the published AdaFace starts."""
        return cls(torch.tensor(20.0, device=device), torch.tensor(100.0, device=device))


@dataclass(frozen=True)
class SampleMargin:
    """The margin of each sample of a batch, and what depends on its norm. Without slopes the norm gets no gradient."""

    margin: Margin
    m2_slope: Tensor | None = None  # [B] d(m2) / d(norm)
    penalty: Tensor | None = None  # [B] what a sample's loss has on top,
    penalty_slope: Tensor | None = None  # and its derivative in the norm


@dataclass(frozen=True)
class AdaFace:
    """Quality-adaptive margin of AdaFace, arXiv:2204.00964: ArcFace's for small norms (poor images), CosFace's for mean ones, and for large
    norms (good images) CosFace's doubled with ArcFace's reversed."""

    m: float = 0.4  # radians and cosine
    h: float = 0.333  # how much of a standard deviation counts

    def __post_init__(self) -> None:
        if not (0.0 < self.m < math.pi / 2 and 0.0 < self.h < math.inf):
            raise ValueError(f"AdaFace needs 0 < m < pi/2 and h > 0, got {self}")

    def of(self, norm: Tensor, statistics: NormStatistics) -> SampleMargin:
        """The margins of a global batch with these norms [B]; ``statistics``: with that batch in them."""
        return SampleMargin((1.0, *adaface_margin(norm, statistics, self.m, self.h)))


@dataclass(frozen=True)
class MagFace:
    """Magnitude-aware margin of MagFace, arXiv:2103.06627; the norm is trained with the rest.

    The margin draws norms down to l_a and the penalty ``lambda_g g`` up to u_a. For an equilibrium between them the penalty must win at
    l_a, for which ``lambda_g >= s (u_m - l_m) / (u_a - l_a) / (l_a^-2 - u_a^-2)`` is enough with the scale s (the check of the published
    training code): 22.6 with the values below, which are the published ones, and s = 64.

    While ``theta + m <= pi/2`` the loss is convex in the norm, and its best norm grows as a sample nears its class center, which is what
    makes the norm a measure of quality. Far beyond, the best norm grows with theta, because the margin's pull ``sin(theta + m)`` fades.

    A norm outside [l_a, u_a] counts as the end that it is beyond and gets no gradient. The published code adds the margin only where
    ``cos theta > 0``, and its target jumps there; here it is added everywhere.
    """

    l_a: float = 10.0  # norms are clamped to [l_a, u_a]
    u_a: float = 110.0
    l_m: float = 0.45  # radians at l_a
    u_m: float = 0.8  # radians at u_a
    lambda_g: float = 35.0  # weight of g

    def __post_init__(self) -> None:
        if not (0.0 < self.l_a < self.u_a < math.inf and 0.0 <= self.l_m < self.u_m < math.pi and 0.0 <= self.lambda_g < math.inf):
            raise ValueError(f"MagFace needs 0 < l_a < u_a, 0 <= l_m < u_m < pi and lambda_g >= 0, got {self}")

    def of(self, norm: Tensor, statistics: NormStatistics) -> SampleMargin:
        """The margins of a global batch with these norms [B]. ``statistics`` are not used."""
        inside = ((norm >= self.l_a) & (norm <= self.u_a)).to(norm.dtype)
        steepness = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        m2 = magface_margin(norm, self.l_a, self.u_a, self.l_m, self.u_m)
        penalty = self.lambda_g * magface_penalty(norm, self.l_a, self.u_a)
        penalty_slope = self.lambda_g * (self.u_a**-2 - norm.clamp(self.l_a, self.u_a) ** -2) * inside
        return SampleMargin((1.0, m2, 0.0), steepness * inside, penalty, penalty_slope)


NormMargin = AdaFace | MagFace


def adaface_margin(norm: Tensor, statistics: NormStatistics, m: float, h: float) -> tuple[Tensor, Tensor]:
    """(m2, m3) of each sample: ``g_angle = -m q`` and ``g_add = m q + m``, q the image's quality (arXiv:2204.00964, Sec. 3.3).

    ``q = (norm - mean) / (std / h)``, clipped to [-1, 1]: -1 gives ArcFace's margin m, 0 CosFace's, 1 the angle -m and the cosine 2 m.
    As in the published code, 1e-3 is added to std, m3 is inside the scale, and norms are clamped to [0.001, 100]. That code also clamps
    the angle under the margin to [0.001, pi - 0.001], beyond which a sample has no gradient: see :func:`model.margin.unified_margin` for
    what stands in its place.

    The norm is a measurement here, as in the paper: no gradient reaches it. Shapes and dtype as ``norm``.
    """
    norm = _measurable(norm.detach())
    quality = (h * (norm - statistics.mean) / (statistics.std + 1e-3)).clamp(-1.0, 1.0)
    return -m * quality, m * quality + m


def next_norm_statistics(statistics: NormStatistics, norm: Tensor) -> NormStatistics:
    """Exponential means over the norms [B] of a global batch, before its loss; 0.99 of the past stays (arXiv:2204.00964, Sec. 3.3).

    The paper's momentum of 0.99 stands there at the new batch; the published code, like this, gives the new one 0.01. It averages on each
    GPU alone. The deviation is the one with B - 1.

    A norm that is not finite (the step will be skipped) leaves both alone, and a single sample, which has no deviation, leaves std.
    """
    measured, finite = _measurable(norm), norm.isfinite().all()

    def moved(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(finite, torch.lerp(old, new.to(old.dtype), 0.01), old)

    std = moved(statistics.std, measured.std()) if norm.numel() > 1 else statistics.std
    return NormStatistics(moved(statistics.mean, measured.mean()), std)


def magface_margin(norm: Tensor, l_a: float, u_a: float, l_m: float, u_m: float) -> Tensor:
    """m2 of each sample, MagFace's m(a): ``(u_m - l_m) / (u_a - l_a) (a - l_a) + l_m`` with a = norm clamped to [l_a, u_a]."""
    return (u_m - l_m) / (u_a - l_a) * (norm.clamp(l_a, u_a) - l_a) + l_m


def magface_penalty(norm: Tensor, l_a: float, u_a: float) -> Tensor:
    """MagFace's g(a) of each sample: ``1/a + a/u_a^2`` with a = norm clamped to [l_a, u_a], where it is convex and falls: it rewards
    large norms, and at u_a no more."""
    a = norm.clamp(l_a, u_a)
    return 1.0 / a + a / u_a**2


def _measurable(norm: Tensor) -> Tensor:
    """Norms beyond what a working network gives say nothing about quality."""
    return norm.clamp(0.001, 100.0)
