"""Pairs of images, wherever they were read from: what an evaluation needs, and no more."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.errors import EvalError
from eval.verification import count_folds
from model.vit import IMAGE_SIZE


@dataclass(frozen=True)
class PairSet:
    """n distinct images, numbered in the order in which they are embedded, and P pairs of them in folds.

    Raises: EvalError that names ``source`` when the parts contradict each other.
    """

    source: Path  # the file that says which pairs
    origin: str  # name of the file that said so first: a pack keeps it
    names: Sequence[str]  # [n] what messages call each image
    read: Callable[[int], bytes]  # number of an image -> its JPEG or PNG file, byte for byte; raises EvalError
    pairs: np.ndarray  # [P, 2] int64, numbers of images
    same: np.ndarray  # [P] bool, True for pairs of one person
    fold: np.ndarray  # [P] int64, from 0

    def __post_init__(self) -> None:
        count, num_images = len(self.pairs), len(self.names)
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

    def decode(self, image: int) -> np.ndarray:
        """Pixels of an image by its number, see ``decode_image``."""
        return decode_image(self.read(image), self.names[image])


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode a JPEG or PNG file: uint8 [112, 112, 3] RGB.

    Raises: EvalError that begins with ``name`` when it can't be decoded, has another size, or more than 8 bits per channel.
    """
    try:
        # No other formats: for some Pillow runs programs, whatever the name of the file says.
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            mode, (width, height) = image.mode, image.size
            right_size = width == height == IMAGE_SIZE
            pixels = np.asarray(image.convert("RGB")) if right_size else None  # a few bytes may claim to be gigapixels
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        raise EvalError(f"{name}: not a readable image: {error}") from error
    if not right_size:
        raise EvalError(f"{name}: expected an aligned {IMAGE_SIZE} x {IMAGE_SIZE} face, found {width} x {height} pixels")
    if mode[0] in "IF":  # Pillow has clipped them to white
        raise EvalError(f"{name}: more than 8 bits per pixel and channel (mode {mode}), expected 8")
    return pixels
