"""Images of faces, wherever they lie: what embedding needs, and no more."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from eval.errors import EvalError
from model.vit import IMAGE_SIZE

IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")  # of files that are taken for images
MAX_PIXELS = 2**26  # of a picture that is not aligned yet, 192 MiB decoded: a few bytes may claim to be gigapixels
MAX_SIDE = 2**15 - 2  # of such a picture; OpenCV warps no longer ones


@dataclass(frozen=True)
class FaceImages:
    """n distinct images, numbered in the order in which they are embedded."""

    names: Sequence[str]  # [n] what messages call each image
    read: Callable[[int], bytes]  # number of an image -> its JPEG or PNG file, byte for byte; raises EvalError
    landmarks: np.ndarray | None = None  # [n, 5, 2] float, pixels (x, y), see eval.align; None: the images are aligned

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, image: int) -> np.ndarray:
        """The face of an image by its number: uint8 [112, 112, 3] RGB, cut out by its landmarks where there are some.

        Raises: EvalError that begins with the name when the file can't be decoded, is no aligned face without landmarks, or larger than
            MAX_PIXELS or MAX_SIDE with them, or is grey with more than 8 bits. Of 16 bits a colour the upper 8 count.
        """
        data, name = self.read(image), self.names[image]
        if self.landmarks is None:
            return decode_image(data, name)
        from eval.align import align  # OpenCV, which aligned faces don't need

        with _opened(data, name, _check_pixels) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        return align(pixels, self.landmarks[image])


def read_image(path: str | Path) -> bytes:
    """The file of an image, byte for byte. Raises: EvalError that names it."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise EvalError(f"{path}: not a readable image: {error}") from error


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode a JPEG or PNG file: uint8 [112, 112, 3] RGB.

    Raises: EvalError that begins with ``name`` when it can't be decoded, has another size, or is grey with more than 8 bits. Of 16 bits a
        colour the upper 8 count.
    """
    with _opened(data, name, _check_aligned) as image:
        return np.asarray(image.convert("RGB"))


def check_header(data: bytes, name: str) -> None:
    """Raise what ``decode_image`` would for what its header says."""
    with _opened(data, name, _check_aligned):
        pass


@contextmanager
def _opened(data: bytes, name: str, check_size: Callable[[int, int], None]) -> Iterator[Image.Image]:
    try:
        # No other formats: for some Pillow runs programs, whatever the name of the file says.
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            check_size(*image.size)  # before decoding
            if image.mode[0] in "IF":  # Pillow would clip them to white
                raise EvalError(f"more than 8 bits per pixel and channel (mode {image.mode}), expected 8")
            yield image
    except EvalError as error:
        raise EvalError(f"{name}: {error}") from None
    except UnidentifiedImageError:  # whose own text names a Python object
        raise EvalError(f"{name}: not a readable image: neither JPEG nor PNG") from None
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        raise EvalError(f"{name}: not a readable image: {error}") from error


def _check_aligned(width: int, height: int) -> None:
    if not width == height == IMAGE_SIZE:
        raise EvalError(f"expected an aligned {IMAGE_SIZE} x {IMAGE_SIZE} face, found {width} x {height} pixels")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise EvalError(f"expected at most {MAX_PIXELS} pixels, {MAX_SIDE} in a row or column, found {width} x {height}")
