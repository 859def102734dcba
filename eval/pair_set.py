"""Pairs of images, wherever they were read from: what an evaluation needs, and no more."""

from dataclasses import dataclass
from functools import cached_property
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
    named_identities: np.ndarray | None = None  # [n] int64, the person on each image, where the source says who; else None

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
        self._check_flags()
        try:
            count_folds(self.fold)
        except EvalError as error:
            raise EvalError(f"{self.source}: {error}") from error
        if self.named_identities is not None:
            self._check_names(self.named_identities)

    @cached_property
    def _keys(self) -> np.ndarray:
        """[P] int64: equal for pairs of the same two images, in whichever order."""
        return self.pairs.min(axis=1) * len(self.images) + self.pairs.max(axis=1)

    @property
    def repeated(self) -> int:
        """Pairs that are here again, in either order; each counts each time, as in the field."""
        return len(self.pairs) - len(np.unique(self._keys))

    @property
    def self_pairs(self) -> int:
        """Pairs of an image with itself: a pack may hold two images that are equal byte for byte."""
        return int(np.count_nonzero(self.pairs[:, 0] == self.pairs[:, 1]))

    def remarks(self) -> list[str]:
        """What is odd about the pairs, a line each."""
        counted = ((self.repeated, "repeated, and count each time"), (self.self_pairs, "of an image with itself"))
        return [f"{self.source}: {count} of {len(self.pairs)} pairs are {what}" for count, what in counted if count]

    @property
    def num_folds(self) -> int:
        return int(self.fold.max()) + 1

    @cached_property
    def identities(self) -> np.ndarray:
        """[n] int64: the person on each image, as named, or else inferred from the pairs.

        Inferred are the connected components of the images through genuine pairs. Two photos of one person that no chain of genuine pairs
        joins then count as two persons, so that there seem to be more persons than there are.
        """
        return connected(self.pairs[self.same], len(self.images)) if self.named_identities is None else self.named_identities

    def _check_flags(self) -> None:
        order = np.lexsort((self.same, self._keys))
        keys, same = self._keys[order], self.same[order]
        contradicts = (keys[1:] == keys[:-1]) & (same[1:] != same[:-1])
        if contradicts.any():
            at = int(np.argmax(contradicts))
            first, second = sorted(order[at : at + 2].tolist())
            raise EvalError(
                f"{self.source}: pairs {first} and {second}, from 0, are of the same two images, once as one person and once as two"
            )

    def _check_names(self, identities: np.ndarray) -> None:
        if identities.shape != (len(self.images),):
            raise EvalError(f"{self.source}: names {len(identities)} identities of {len(self.images)} images, expected one of each")
        first, second = identities[self.pairs].T
        wrong = (first == second) != self.same
        if wrong.any():
            pair = int(np.argmax(wrong))
            kind = "of one person" if self.same[pair] else "of two persons"
            raise EvalError(f"{self.source}: pair {pair} is {kind}, but its images show the identities {first[pair]} and {second[pair]}")


def connected(edges: np.ndarray, count: int) -> np.ndarray:
    """[count] int64: the connected component of each node, numbered from 0 in the order of their first nodes; ``edges``: [E, 2] nodes."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in edges.tolist():
        low, high = sorted((root(first), root(second)))
        parent[high] = low  # the root is the first node of its component
    return np.unique([root(node) for node in range(count)], return_inverse=True)[1].astype(np.int64)
