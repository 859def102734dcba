"""The margins that a recipe can name: ``head.margin``, and ``margin`` of a stage."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, Tag

from train.section import Probability, Section


class MarginSection(Section):
    """What the margins have in common."""

    kind: str

    def text(self) -> str:
        """``unified m1 1 m2 0.5 m3 0``."""
        values = [f"{name} {value:g}" for name, value in self if isinstance(value, float)]
        return " ".join([self.kind, *values, *(name for name, value in self if value is True)])


class UnifiedMargin(MarginSection):
    """Target logit: s (cos(m1 theta + m2) - m3). SphereFace, ArcFace and CosFace, alone or together."""

    kind: Literal["unified"] = "unified"
    m1: Annotated[float, Field(ge=1)] = 1.0  # factor (SphereFace)
    m2: Annotated[float, Field(ge=0, lt=math.pi)] = 0.0  # radians (ArcFace)
    m3: Probability = 0.0  # cosine (CosFace)
    curricular: bool = False  # hard negatives count for more, as in CurricularFace


class AdaFaceMargin(MarginSection):
    """The margin follows the embedding's norm as a measure of image quality: AdaFace, arXiv:2204.00964."""

    kind: Literal["adaface"]
    m: Annotated[float, Field(gt=0, lt=math.pi / 2)] = 0.4  # radians and cosine
    h: PositiveFloat = 0.333  # how much of a norm's standard deviation counts


class MagFaceMargin(MarginSection):
    """The angle grows with the embedding's norm, which is trained along: MagFace, arXiv:2103.06627."""

    kind: Literal["magface"]
    l_a: PositiveFloat = 10.0  # norms are clamped to [l_a, u_a]
    u_a: PositiveFloat = 110.0
    l_m: Annotated[float, Field(ge=0, lt=math.pi)] = 0.45  # radians at l_a
    u_m: Annotated[float, Field(ge=0, lt=math.pi)] = 0.8  # radians at u_a
    lambda_g: NonNegativeFloat = 35.0  # weight of the term that makes norms large


def _kind(margin: Any) -> str:
    return str(margin.get("kind", "unified")) if isinstance(margin, dict) else getattr(margin, "kind", "unified")


Margin = Annotated[
    Annotated[UnifiedMargin, Tag("unified")] | Annotated[AdaFaceMargin, Tag("adaface")] | Annotated[MagFaceMargin, Tag("magface")],
    Discriminator(_kind),
]
