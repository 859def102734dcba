"""A contact sheet of the augmentation: some images of a set, what each change makes of them, and what training sees."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import pipeline_def
from PIL import Image, ImageDraw, ImageFont

from data_pipeline import SIDE
from data_pipeline.augment import Augment
from data_pipeline.errors import DataError
from data_pipeline.fetch import RecordFetcher
from data_pipeline.graph import Decode, Share, dali_reason, drawn_names, fed, feed_draws, feed_images, pixels, run, tensor
from data_pipeline.order import EpochOrder
from data_pipeline.output import replace_file
from data_pipeline.record_table import AllBut
from data_pipeline.shard_set import ShardSet, open_set

# What a sheet shows when no recipe is given: every change, at strengths that leave most images recognisable.
MODERATE = Augment(downscale=0.2, blur=0.2, color=0.2, gray=0.1, brightness=0.2, shift_px=6, erase=0.2, flip=0.5)
DRAWS = 4  # columns that show what training sees

_ON_EVERY_IMAGE = ("brightness", "shift_px")  # the other changes have a probability
_FORMATS: dict[str, dict[str, Any]] = {".png": {"format": "PNG", "optimize": True}, ".jpg": {"format": "JPEG", "quality": 90}}
_MARGIN, _GAP, _GROUP_GAP = 16, 6, 22  # pixels around the sheet, between tiles, between groups of columns
_HEAD = 66  # pixels of titles
_PAPER, _INK, _FAINT, _RULE = (255, 255, 255), (32, 36, 42), (112, 118, 128), (206, 210, 216)
_Column = tuple[str, str, np.ndarray]  # title, what it means, [n, 112, 112, 3] uint8


def preview(path: Path, out: Path, augment: Augment, *, images: int = 6, seed: int = 0, force: bool = False) -> list[str]:
    """Write a sheet of ``images`` images of a set, a row each, chosen by ``seed``: as stored, each change of ``augment`` made on every
    image and alone, and ``DRAWS`` draws of ``augment`` as training would see them. Returns the names of the rows' records.

    What is seen is what is trained on: pixels come out of the loader's DALI graph (``graph.pixels``), decoded on the CPU. ``out``, a .png
    or .jpg, appears when it is complete, or not at all.
    Raises DataError: no such set, fewer images than asked for, an image that cannot be read, an ``out`` of another kind or that exists
    (without ``force``).
    """
    _refuse(out, force)
    if seed < 0:
        raise DataError(f"--seed {seed}: must be at least 0")
    faces = open_set(path)
    count = faces.num_images - len(faces.excluded)
    if not 1 <= images <= count:
        raise DataError(f"--images {images}: must lie in [1, {count}], the number of images in {path}")
    numbers = AllBut(faces.excluded)[EpochOrder(count, 1, seed).images(0, np.arange(images))]
    sheet = _sheet(_columns(_fetched(faces, numbers), augment, seed))
    file = io.BytesIO()
    sheet.save(file, **_FORMATS[out.suffix])
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, file.getvalue())
    return faces.names(numbers)


def _refuse(out: Path, force: bool) -> None:
    if out.suffix not in _FORMATS:
        raise DataError(f"{out}: expected a name that ends in {' or '.join(_FORMATS)}")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; choose another output")
    if out.exists() and not force:
        raise DataError(f"{out}: exists already; give --force to replace it, or choose another output")


def _fetched(faces: ShardSet, numbers: np.ndarray) -> list[memoryview]:
    images = RecordFetcher(faces).fetch(numbers)
    for image in images:
        if isinstance(image, DataError):
            raise image
    return images


def _columns(encoded: list[memoryview], augment: Augment, seed: int) -> list[tuple[str, list[_Column]]]:
    """Groups of columns, each with a title."""
    share = Share(EpochOrder(len(encoded), len(encoded), seed), len(encoded), 0, 1)  # a batch is an epoch of these images

    def shown(what: Augment, draws: int = 1) -> list[np.ndarray]:
        return _shown(encoded, what, share, draws)

    alone = []
    for name, value in asdict(augment).items():
        if value:
            (changed,) = shown(Augment(**{"flip": 0.0, name: value if name in _ON_EVERY_IMAGE else 1.0}))
            alone.append((name, _meaning(name, value), changed))
    (stored,) = shown(Augment(flip=0.0))
    trained = [(f"draw {i}", "", image) for i, image in enumerate(shown(augment, DRAWS), 1)]
    groups = [("", [("as stored", "", stored)]), ("each change alone, on every image", alone), ("as training sees them", trained)]
    return [(title, columns) for title, columns in groups if columns]


def _meaning(name: str, value: float) -> str:
    if name == "brightness":
        return f"by {1 - value:g} to {1 + value:g}"
    if name == "shift_px":
        return f"up to {value} pixels"
    return f"in training: {100 * value:g} %"


def _shown(encoded: list[memoryview], augment: Augment, share: Share, draws: int) -> list[np.ndarray]:
    """``draws`` times [n, 112, 112, 3] uint8: the images of the first epochs."""
    device = torch.device("cpu")
    pipeline = _pipeline(augment, batch_size=len(encoded), num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    shown = []
    for step in range(draws):
        feed_images(pipeline, encoded)
        feed_draws(pipeline, augment, share, step)
        try:
            (images,) = run(pipeline, device)
        except RuntimeError as error:
            raise DataError(f"an image cannot be decoded ({dali_reason(error)}): let `python -m data_pipeline verify` find it") from error
        shown.append(tensor(images).numpy())
    return shown


@pipeline_def(enable_conditionals=True)
def _pipeline(augment: Augment) -> Any:
    inputs = fed(["encoded", *drawn_names(augment)])
    return pixels(inputs["encoded"], inputs, augment, Decode())


def _sheet(groups: list[tuple[str, list[_Column]]]) -> Image.Image:
    """Titles above, an image a row."""
    columns = sum(len(columns) for _, columns in groups)
    rows = len(groups[0][1][0][2])
    width = 2 * _MARGIN + columns * (SIDE + _GAP) - len(groups) * _GAP + (len(groups) - 1) * _GROUP_GAP
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _HEAD + rows * (SIDE + _GAP) - _GAP), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    fonts = {size: ImageFont.load_default(size) for size in (12, 14, 15)}
    left = _MARGIN
    for title, columns in groups:
        right = left + len(columns) * (SIDE + _GAP) - _GAP
        if title:
            canvas.text((left, _MARGIN), title, _INK, fonts[15])
            canvas.line((left, _MARGIN + 23, right - 1, _MARGIN + 23), _RULE)
        for name, meaning, images in columns:
            canvas.text((left, _MARGIN + 29), name, _INK, fonts[14])
            canvas.text((left, _MARGIN + 46), meaning, _FAINT, fonts[12])
            for row, image in enumerate(images):
                sheet.paste(Image.fromarray(image), (left, _MARGIN + _HEAD + row * (SIDE + _GAP)))
            left += SIDE + _GAP
        left = right + _GROUP_GAP
    return sheet
