"""Images of faces, wherever they lie: what embedding needs, and no more."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eval.errors import EvalError
from model.vit import IMAGE_SIZE


@dataclass(frozen=True)
class FaceImages:
    """n distinct images, numbered in the order in which they are embedded."""

    names: Sequence[str]  # [n] what messages call each image
    read: Callable[[int], bytes]  # number of an image -> its JPEG or PNG file, byte for byte; raises EvalError

    def __len__(self) -> int:
        return len(self.names)

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
