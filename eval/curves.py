"""What is drawn of scores: a ROC curve in few points, and histograms of genuine and impostor scores."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NUM_BINS = 100
LEAST_SPREAD = 1e-9  # of scores that fill bins; less is rounding, and edges would coincide
POINTS_PER_DECADE = 20  # of FAR


@dataclass(frozen=True)
class ScoreCurves:
    """Plain numbers, for JSON and pictures. A pair is accepted when its score is at least the threshold."""

    genuine: int  # pairs of one person
    impostor: int  # pairs of two persons
    far: list[float]  # rising, from 1 / impostor to 1
    tar: list[float]  # the highest whose FAR is at most ``far``
    edges: list[float]  # [NUM_BINS + 1] of the histograms' bins, from the lowest score to the highest
    genuine_counts: list[int]  # [NUM_BINS]
    impostor_counts: list[int]  # [NUM_BINS]


def score_curves(genuine: ArrayLike, impostor: ArrayLike) -> ScoreCurves:
    """Of finite scores, [G] and [I], neither of them empty; float32 or float64, in any order."""
    genuine, impostor = np.sort(genuine), np.sort(impostor)
    decades = np.log10(len(impostor))
    far = np.logspace(-decades, 0, max(2, int(decades * POINTS_PER_DECADE)))
    far[0], far[-1] = 1 / len(impostor), 1
    allowed = np.floor(far * len(impostor) + 1e-9).astype(np.int64)  # false accepts
    # Accepted is what lies above the highest impostor that may not be accepted.
    refused = impostor[len(impostor) - 1 - np.minimum(allowed, len(impostor) - 1)]
    tar = np.where(allowed >= len(impostor), 1, 1 - np.searchsorted(genuine, refused, side="right") / len(genuine))
    low, high = float(min(genuine[0], impostor[0])), float(max(genuine[-1], impostor[-1]))
    edges = np.linspace(low, high if high - low > LEAST_SPREAD else low + 1, NUM_BINS + 1)
    counts = (np.histogram(scores, edges)[0].tolist() for scores in (genuine, impostor))
    return ScoreCurves(len(genuine), len(impostor), far.tolist(), tar.tolist(), edges.tolist(), *counts)
