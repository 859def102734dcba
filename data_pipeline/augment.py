"""Random changes of the training images: what is drawn for an image, and the part of the DALI graph that does it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, types

from data_pipeline import SIDE
from data_pipeline.errors import DataError

GREY = 127  # what a shifted or erased image shows there; half a grey level from 0 after normalisation

# The ranges that the field draws from (InsightFace's augmentation for Partial FC).
_DOWNSCALE_PX = (56, 89)
_BLUR_WINDOWS = (3, 5)
_HUE_DEGREES = (0.0, 20.0)
_SATURATION = (1.0, 1.2)
# Random Erasing, arXiv:1708.04896, with the largest area halved: a face of 112 pixels has no background to spare.
_ERASED_AREA = (0.02, 0.2)
_ERASED_ASPECT = (0.3, 1 / 0.3)

NUM_DRAWS = 17  # uniform numbers that an image's changes take


@dataclass(frozen=True)
class Augment:
    """Random changes, drawn per image, in the order in which they are made."""

    downscale: float = 0.0  # probability of shrinking to 56 to 89 pixels and back
    blur: float = 0.0  # probability of a Gaussian blur over 3 or 5 pixels
    color: float = 0.0  # probability of a hue turned by up to 20 degrees, and a saturation of 1 to 1.2
    gray: float = 0.0  # probability of no color
    brightness: float = 0.0  # factor on the pixel values, uniform in [1 - brightness, 1 + brightness], clipped to 0..255
    shift_px: int = 0  # translation, uniform in [-shift_px, shift_px] on each axis; what it uncovers is grey (127)
    erase: float = 0.0  # probability of a grey rectangle of 2 to 20 % of the image
    flip: float = 0.5  # probability of a left-right mirror image

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            high = SIDE // 2 if name == "shift_px" else 1
            if not 0 <= value <= high:
                raise DataError(f"augment.{name}: must lie in [0, {high}], got {value}")

    def draw(self, uniforms: np.ndarray) -> dict[str, np.ndarray]:
        """What happens to each image: arguments for ``apply``, [b, ...] each, of the changes that are switched on.

        ``uniforms``: [b, NUM_DRAWS] in [0, 1). An image's arguments depend on its row alone, and those of one change not on the others.
        """
        u = uniforms.T  # each change has rows to itself
        drawn = {}
        if self.flip:
            drawn["flip"] = (u[0] < self.flip).astype(np.int32)
        if self.shift_px:
            drawn["shift"] = _whole(np.stack(u[1:3], axis=1), -self.shift_px, self.shift_px).astype(np.int32)
        if self.brightness:
            drawn["brightness"] = _between(u[3], 1 - self.brightness, 1 + self.brightness)
        if self.downscale:
            chosen, size = u[4:6]
            drawn |= {"downscale": chosen < self.downscale, "downscale_px": _whole(size, *_DOWNSCALE_PX)}
        if self.blur:
            chosen, window = u[6:8]
            drawn |= {"blur": chosen < self.blur, "blur_window": np.take(_BLUR_WINDOWS, window >= 0.5).astype(np.int32)}
        if self.color:
            chosen, hue, saturation = u[8:11]
            drawn |= {"color": chosen < self.color, "hue": _between(hue, *_HUE_DEGREES), "saturation": _between(saturation, *_SATURATION)}
        if self.gray:
            drawn["gray"] = u[11] < self.gray
        if self.erase:
            chosen, area, aspect, *place = u[12:17]
            ratio = np.exp(_between(aspect, *np.log(_ERASED_ASPECT)))
            shape = np.rint(SIDE * np.sqrt(_between(area, *_ERASED_AREA)[:, None] * np.stack([ratio, 1 / ratio], axis=1)))
            anchor = _whole(np.stack(place, axis=1), 0, SIDE - shape)
            drawn |= {"erase": chosen < self.erase, "erase_shape": shape, "erase_anchor": anchor}
        return drawn

    def apply(self, image: Any, drawn: dict[str, Any]) -> Any:
        """The DALI graph: [112, 112, 3] uint8 -> the same. ``drawn``: of ``draw``.

        An ``if`` with something drawn is part of the graph: only images that a change was drawn for pay for it.
        """
        if self.downscale and drawn["downscale"]:
            small = fn.resize(image, resize_x=drawn["downscale_px"], resize_y=drawn["downscale_px"])
            image = fn.resize(small, size=(SIDE, SIDE))
        if self.blur and drawn["blur"]:
            image = fn.gaussian_blur(image, window_size=drawn["blur_window"])
        if self.color and drawn["color"]:
            image = fn.hsv(image, hue=drawn["hue"], saturation=drawn["saturation"])
        if self.gray and drawn["gray"]:
            # hsv with a saturation of 0 would leave some pixels a level of color, and take ten times as long.
            luma = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
            image = fn.color_space_conversion(luma, image_type=types.GRAY, output_type=types.RGB)
        if self.brightness:
            image = fn.brightness(image, brightness=drawn["brightness"])
        if self.shift_px:
            image = fn.slice(image, start=drawn["shift"], shape=[SIDE, SIDE], axes=(0, 1), out_of_bounds_policy="pad", fill_values=GREY)
        if self.erase and drawn["erase"]:
            image = fn.erase(image, anchor=drawn["erase_anchor"], shape=drawn["erase_shape"], axes=(0, 1), fill_value=GREY)
        if self.flip:
            image = fn.flip(image, horizontal=drawn["flip"])
        return image


def _between(uniform: np.ndarray, low: float, high: float) -> np.ndarray:
    """Float32 in [low, high]."""
    return (low + (high - low) * uniform).astype(np.float32)


def _whole(uniform: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Whole numbers from ``low`` to ``high``, both included, as float32."""
    return (low + np.floor(uniform * (high - low + 1))).astype(np.float32)
