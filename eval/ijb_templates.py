"""From embeddings of images to one of each template, in each of the field's eight modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eval.errors import EvalError
from eval.ijb_meta import IjbTemplates

CHUNK_ROWS = 4096  # memberships whose embeddings are in memory at once, unless one template has more


@dataclass(frozen=True)
class Mode:
    """How an image's embedding enters its template. The field publishes N1D1F1."""

    norm: bool  # N1: as long as the network made it; N0: L2-normalised (with F1 the sum is)
    detector: bool  # D1: times the score of the face detector; D0: not
    flip: bool  # F1: image and mirror summed; F0: the image alone

    def __str__(self) -> str:
        return f"N{self.norm:d}D{self.detector:d}F{self.flip:d}"


MODES = tuple(Mode(norm, detector, flip) for norm in (True, False) for detector in (True, False) for flip in (True, False))
DEFAULT_MODE = MODES[0]


def pool_templates(embeddings: np.ndarray, templates: IjbTemplates, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Of each template the mean inside each media, summed over its media and L2-normalised; in all modes, in one pass.

    A template is thus a weighted sum of its images, whose weights are, over the number of images of their media in the template, the
    factors of the mode: one small matrix product serves the modes of one F.

    Args:
        embeddings: [n, 2, D] of each image and its mirror, not normalised. May be mapped from the disk: it is read once, in parts.
        templates: of those n images.
        progress: called as (memberships done, in all).
    Returns: [len(MODES), T, D] float32, rows of length 1 in the order of ``templates.ids``; summed in float64.
    Raises: EvalError that names the image whose embedding, or the template whose sum, is zero or not finite.
    """
    starts = np.searchsorted(templates.template, np.arange(len(templates.ids) + 1))
    shares = _media_shares(templates)
    pooled = np.empty((len(MODES), len(templates.ids), embeddings.shape[2]), np.float32)
    first = 0
    while first < len(templates.ids):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + CHUNK_ROWS, side="right")) - 1)
        members = slice(starts[first], starts[last])
        image = templates.image[members]
        rows = np.asarray(embeddings[image], dtype=np.float64)
        bounds = starts[first : last + 1] - starts[first]
        for flip, features in ((True, rows[:, 0] + rows[:, 1]), (False, rows[:, 0])):
            modes = [index for index, mode in enumerate(MODES) if mode.flip == flip]
            lengths = _lengths(features, image, templates)
            weights = np.stack([_weights(MODES[mode], templates.scores[image], lengths) * shares[members] for mode in modes])
            sums = np.stack([weights[:, a:b] @ features[a:b] for a, b in pairwise(bounds)], axis=1)
            pooled[modes, first:last] = _unit(sums, modes, templates.ids[first:last])
        first = last
        if progress:
            progress(int(members.stop), len(templates.image))
    return pooled


def _media_shares(templates: IjbTemplates) -> np.ndarray:
    """[m] float64: one over the number of images of the same media in the same template."""
    begins = np.flatnonzero((np.diff(templates.template, prepend=-1) != 0) | (np.diff(templates.media, prepend=-1) != 0))
    counts = np.diff(begins, append=len(templates.image))
    return np.repeat(1 / counts, counts)


def _weights(mode: Mode, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return (scores if mode.detector else np.ones_like(scores)) / (1 if mode.norm else lengths)


def _lengths(features: np.ndarray, image: np.ndarray, templates: IjbTemplates) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        raise EvalError(f"{templates.images.names[image[int(np.argmax(bad))]]}: its embedding is zero or not finite")
    return lengths


def _unit(sums: np.ndarray, modes: list[int], ids: np.ndarray) -> np.ndarray:
    """[modes, templates, D] to length 1."""
    lengths = np.linalg.norm(sums, axis=2, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0))[..., 0]
    if bad.any():
        mode, template = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise EvalError(f"template {ids[template]}: its images add up to zero in mode {MODES[modes[mode]]}; check their detector scores")
    return sums / lengths
