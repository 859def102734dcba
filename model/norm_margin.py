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
    """Quality-adaptive margin of AdaFace, arXiv:2204.00964: angular for norms above the mean, additive below."""

    m: float = 0.4  # radians and cosine
    h: float = 0.333  # how much of a standard deviation counts

    def __post_init__(self) -> None:
        if not (0.0 < self.m < math.pi / 2 and 0.0 < self.h < math.inf):
            raise ValueError(f"AdaFace needs 0 < m < pi/2 and h > 0, got {self}")

    def of(self, norm: Tensor, statistics: NormStatistics) -> SampleMargin:
        return SampleMargin((1.0, *adaface_margin(norm, statistics, self.m, self.h)))


@dataclass(frozen=True)
class MagFace:
    """Magnitude-aware margin of MagFace, arXiv:2103.06627; the norm is trained with the rest."""

    l_a: float = 10.0  # norms are clamped to [l_a, u_a]
    u_a: float = 110.0
    l_m: float = 0.45  # radians at l_a
    u_m: float = 0.8  # radians at u_a
    lambda_g: float = 35.0  # weight of g

    def __post_init__(self) -> None:
        if not (0.0 < self.l_a < self.u_a < math.inf and 0.0 <= self.l_m < self.u_m < math.pi and 0.0 <= self.lambda_g < math.inf):
            raise ValueError(f"MagFace needs 0 < l_a < u_a, 0 <= l_m < u_m < pi and lambda_g >= 0, got {self}")

    def of(self, norm: Tensor, statistics: NormStatistics) -> SampleMargin:
        inside = (norm >= self.l_a) & (norm <= self.u_a)
        steepness = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        m2 = magface_margin(norm, self.l_a, self.u_a, self.l_m, self.u_m)
        penalty = self.lambda_g * magface_penalty(norm, self.l_a, self.u_a)
        penalty_slope = self.lambda_g * (self.u_a**-2 - norm**-2) * inside
        return SampleMargin((1.0, m2, 0.0), steepness * inside, penalty, penalty_slope)


NormMargin = AdaFace | MagFace


def adaface_margin(norm: Tensor, statistics: NormStatistics, m: float, h: float) -> tuple[Tensor, Tensor]:
    """(m2, m3) of each sample: ``g_angle = -m q`` and ``g_add = m q + m`` (arXiv:2204.00964, Eq. 16), q the image's quality.

    ``q = (norm - mean) / (std / h)``, clipped to [-1, 1] (Eq. 14): -1 gives ArcFace's margin, 0 CosFace's, 1 a negative angular one.
    The norm is a measurement here: no gradient reaches it. Shapes as ``norm``.
    """
    norm = _measurable(norm.detach())
    quality = (h * (norm - statistics.mean) / (statistics.std + 1e-3)).clamp(-1.0, 1.0)
    return -m * quality, m * quality + m


def next_norm_statistics(statistics: NormStatistics, norm: Tensor) -> NormStatistics:
    """Exponential means, weight of the past 0.99 (arXiv:2204.00964, Sec. 3.3), over the norms [B] of a global batch, before its loss.

    Values that are not finite (the step will be skipped, or B = 1 has no deviation) leave them alone.
    """
    norm = _measurable(norm)

    def moved(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(new.isfinite(), torch.lerp(old, new.to(old.dtype), 0.01), old)

    return NormStatistics(moved(statistics.mean, norm.mean()), moved(statistics.std, norm.std()))


def magface_margin(norm: Tensor, l_a: float, u_a: float, l_m: float, u_m: float) -> Tensor:
    """m2 of each sample: ``m(a) = (u_m - l_m) / (u_a - l_a) (a - l_a) + l_m``, a = norm clamped to [l_a, u_a]
    (arXiv:2103.06627, Sec. 3.2)."""
    return (u_m - l_m) / (u_a - l_a) * (norm.clamp(l_a, u_a) - l_a) + l_m


def magface_penalty(norm: Tensor, l_a: float, u_a: float) -> Tensor:
    """``g(a) = 1/a + a/u_a^2``, convex and falling up to u_a: it rewards large norms (arXiv:2103.06627, Sec. 3.2)."""
    a = norm.clamp(l_a, u_a)
    return 1.0 / a + a / u_a**2


def _measurable(norm: Tensor) -> Tensor:
    """Norms beyond what a working network gives say nothing about quality."""
    return norm.clamp(0.001, 100.0)
