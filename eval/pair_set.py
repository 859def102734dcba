"""Pairs of images, wherever they were read from: what an evaluation needs, and no more."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.errors import EvalError
from eval.images import FaceImages
from eval.verification import count_folds


@dataclass(frozen=True)
class PairSet:
    """Distinct images, and P pairs of them in folds.

    Raises: EvalError that names ``source`` when the parts contradict each other.
    """

    source: Path  # the file that says which pairs
    origin: str  # name of the file that said so first: a pack keeps it
    images: FaceImages
    pairs: np.ndarray  # [P, 2] int64, numbers of images
    same: np.ndarray  # [P] bool, True for pairs of one person
    fold: np.ndarray  # [P] int64, from 0

    def __post_init__(self) -> None:
        count, num_images = len(self.pairs), len(self.images)
        if not count or not num_images:
            raise EvalError(f"{self.source}: holds {count} pairs of {num_images} images, expected some")
        if not len(self.same) == len(self.fold) == count:
            found = f"{count} pairs, {len(self.same)} times 'same' and {len(self.fold)} folds"
            raise EvalError(f"{self.source}: holds {found}, expected one of each per pair")
        outside = (self.pairs < 0) | (self.pairs >= num_images)
        if outside.any():
            pair = int(np.argmax(outside.any(axis=1)))
            found = self.pairs[pair].tolist()
            raise EvalError(f"{self.source}: pair {pair} is of the images {found}, expected numbers from 0 to {num_images - 1}")
        try:
            count_folds(self.fold)
        except EvalError as error:
            raise EvalError(f"{self.source}: {error}") from error

    @property
    def num_folds(self) -> int:
        return int(self.fold.max()) + 1
