"""Faces cut out by their five landmarks, as the field does: a similarity to the 112 x 112 template, then OpenCV's bilinear warp."""

import cv2
import numpy as np
from numpy.typing import ArrayLike

from model.vit import IMAGE_SIZE

# Left eye, right eye, tip of the nose, left and right corner of the mouth (as seen in the picture): pixels (x, y) of an aligned face.
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])


def similarities(landmarks: ArrayLike) -> np.ndarray:
    """The rotation, scale and shift that bring landmarks nearest to ``TEMPLATE`` in the sum of squared distances; never a reflection.

    What Umeyama (1991) finds by a singular value decomposition has a closed form in the plane: with points as complex numbers, counted
    from their mean, the map is z -> a z, and least squares gives ``a = sum(conj(z) w) / sum(|z|^2)`` for the template's points w.

    Args:
        landmarks: [..., 5, 2] pixels (x, y), in the order of ``TEMPLATE``.
    Returns: [..., 2, 3] float64, from the picture to the aligned face; not finite, or of scale 0, where ``aligns`` says no.
    """
    points, target = (_complex(np.asarray(each, dtype=np.float64)) for each in (landmarks, TEMPLATE))
    centre, to = points.mean(axis=-1, keepdims=True), target.mean()
    z, w = points - centre, target - to
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (z.conj() * w).sum(axis=-1) / (np.abs(z) ** 2).sum(axis=-1)
        shift = to - a * centre[..., 0]
    return np.stack([np.stack([a.real, -a.imag, shift.real], axis=-1), np.stack([a.imag, a.real, shift.imag], axis=-1)], axis=-2)


def aligns(landmarks: ArrayLike) -> np.ndarray:
    """Whether landmarks [..., 5, 2] place a face: bool [...].

    They do not when one is not finite, all lie within a hundredth of a pixel, or they resemble the template so little that the nearest
    similarity draws all of them together in a point (to a thousandth of the template's size).
    """
    landmarks = np.asarray(landmarks, dtype=np.float64)
    finite = np.isfinite(landmarks).all(axis=(-2, -1))
    known = np.where(finite[..., None, None], landmarks, TEMPLATE)
    spread = _spread(known)
    matrices = similarities(known)
    shrunk = np.hypot(matrices[..., 0, 0], matrices[..., 1, 0]) * spread
    return finite & (spread > 0.01) & (np.nan_to_num(shrunk) > 1e-3 * _spread(TEMPLATE))


def align(pixels: np.ndarray, landmarks: ArrayLike) -> np.ndarray:
    """Warp a picture, uint8 [h, w, 3], by its landmarks [5, 2]: uint8 [112, 112, 3], black beyond its edges, colours in their order."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return cv2.warpAffine(pixels, similarities(landmarks), size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)


def _complex(points: np.ndarray) -> np.ndarray:
    return points[..., 0] + 1j * points[..., 1]


def _spread(points: np.ndarray) -> np.ndarray:
    """Root mean squared distance from the mean: [...] of [..., 5, 2]."""
    return np.sqrt(((points - points.mean(axis=-2, keepdims=True)) ** 2).sum(axis=-1).mean(axis=-1))
