"""Images of faces, wherever they lie: what embedding needs, and no more."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    with _opened(data, name) as image:
        return np.asarray(image.convert("RGB"))


def check_header(data: bytes, name: str) -> None:
    """Raise what ``decode_image`` would for what its header says."""
    with _opened(data, name):
        pass


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    try:
        # No other formats: for some Pillow runs programs, whatever the name of the file says.
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE):  # before decoding: a few bytes may claim to be gigapixels
                raise EvalError(f"expected an aligned {IMAGE_SIZE} x {IMAGE_SIZE} face, found {image.width} x {image.height} pixels")
            if image.mode[0] in "IF":  # Pillow would clip them to white
                raise EvalError(f"more than 8 bits per pixel and channel (mode {image.mode}), expected 8")
            yield image
    except EvalError as error:
        raise EvalError(f"{name}: {error}") from None
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        raise EvalError(f"{name}: not a readable image: {error}") from error
